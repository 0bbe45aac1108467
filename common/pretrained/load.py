"""Load somebody else's weights into our model: `load_pretrained(source)`.

Names, shapes and formats are in the headers of the files, so everything that can be wrong with them is looked for before
any memory is allocated. Then the model is built without storage and filled one tensor at a time: the peak memory of a load
is that of the weights and of the largest tensor. Only safetensors, GGUF and JSON are read; a pickle is refused, whatever
its name.
"""

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import regex
import torch

from common.foundation.assets import asset, catalogue
from common.foundation.gguf_file import GGUFFile
from common.model.config import ModelConfig
from common.model.initialise import without_storage
from common.model.positions import rope_frequencies
from common.model.transformer import Transformer
from common.pretrained.configs import config_from_gguf, config_from_hf
from common.pretrained.names import GGUF_LLAMA, GGUF_QWEN3, Family, family_of, matched, renamed
from common.pretrained.stored import INDEX, NUMBER_FORMATS, Dequantised, Shards, json_object
from common.tokenization.bpe import BPETokenizer
from common.tokenization.interop import from_hf_json, tokenizer_of_metadata
from common.tokenization.protocol import Tokenizer
from common.training.checkpoint import load_with_tokenizer

HUB_FILES = ["config.json", "model*.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja", "generation_config.json"]  # fmt: skip
WRONG = (KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError)  # what code raises on unexpected JSON
# The fields of a config that are computed with, in JSON and (without the name of the family) in GGUF. They are checked here,
# before anything is computed. All other fields are compared with the values that we support.
WHOLE = {"vocab_size", "n_positions", "n_layer", "n_embd", "n_head", "n_inner", "max_position_embeddings", "hidden_size",
         "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
         "intermediate_size", "num_local_experts", "num_experts_per_tok", "original_max_position_embeddings",
         "context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
         "attention.head_count_kv", "attention.key_length", "rope.dimension_count"}  # fmt: skip
REAL = {"layer_norm_epsilon", "rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast",
        "beta_slow", "partial_rotary_factor", "attention.layer_norm_rms_epsilon", "rope.freq_base",
        "rope.scaling.factor"}  # fmt: skip
KINDS = {"tie_word_embeddings": bool, "attention_bias": bool, "mlp_bias": bool, "activation_function": str,
         "rope_type": str, "type": str, "rope.scaling.type": str, "rope_parameters": dict, "rope_scaling": dict}  # fmt: skip
LARGEST = 2**31 - 1


class Pretrained(NamedTuple):
    """A model, its tokenizer, and the source of its chat template; the last two are None where the folder has none."""

    model: Any
    tokenizer: Tokenizer | None
    chat_template: str | None


def load_pretrained(source: str | Path, *, dtype: torch.dtype | None = None, tokenizer: bool = True) -> Pretrained:
    """Read a model and return it in our form, in evaluation mode.

    Args:
        source: "smollm2"; a GGUF file; a folder as Hugging Face writes it (GPT-2, Llama, Qwen3, Mistral, Mixtral); one of
            our runs, or a checkpoint in it; or a name on the Hugging Face hub, "owner/model", which is fetched.
        dtype: of the weights in memory. None means the format of the embedding in a folder, and float32 for GGUF.
        tokenizer: False loads no tokenizer. It is for files whose tokenizer we cannot read.
    Raises:
        FileNotFoundError: there is nothing at that place.
        AssetUnavailable: "smollm2" cannot be fetched.
        ValueError: something in the files does not fit. The message names the file and the field or tensor. No partial model
            is ever returned.
    """
    if dtype is not None and dtype not in NUMBER_FORMATS.values():
        raise ValueError(f"dtype {dtype}: weights are kept as one of {', '.join(map(str, NUMBER_FORMATS.values()))}")
    name, path = str(source), Path(source)
    if name in catalogue() and not path.exists():
        path = asset(name)
    if path.is_file():
        return _from_gguf(path, dtype, tokenizer)
    if not path.is_dir() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        path = _from_hub(name)
    for ours in (path, path / "model", path / "text"):
        if (ours / "checkpoint.json").exists():
            try:
                model, words = load_with_tokenizer(ours)
            except WRONG as error:
                raise ValueError(f"{ours / 'checkpoint.json'} has no usable {error}") from error
            return Pretrained(model if dtype is None else model.to(dtype), words, None)
    return _from_folder(path, dtype, tokenizer)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the library has many kinds: no network, no such model, no permission
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and could not be fetched from the hub: {said}"
        ) from error


# --- folders ----------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, dtype: torch.dtype | None, wants_tokenizer: bool) -> Pretrained:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder}")
    described = json_object(folder / "config.json")
    config = _config(described, "", config_from_hf, str(folder / "config.json"))
    theirs, family = Shards(folder), family_of(config)
    odd = [name for name, form in theirs.formats.items() if form not in NUMBER_FORMATS]
    if odd := [name for name in odd if not family.buffers.search(name)]:
        raise ValueError(
            f"{folder}: {odd[0]} ({theirs.formats[odd[0]]}) is not in {', '.join(NUMBER_FORMATS)}; "
            "quantised folders are not read"
        )
    words = folder / "tokenizer.json"
    made = _tokenizer(lambda: from_hf_json(words), config, str(words)) if wants_tokenizer and words.exists() else None
    template = _with_tokens(_template_of(folder), folder)
    return Pretrained(_filled(config, theirs, family, dtype, str(folder)), made, template)


def _template_of(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text: {error}") from error
    path = folder / "tokenizer_config.json"
    found = json_object(path).get("chat_template") if path.exists() else None
    if isinstance(found, list):  # several, by name
        by_name = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        found = by_name.get("default")
    return _text(found, f"{path}: chat_template")


def _with_tokens(template: str | None, folder: Path) -> str | None:
    """The template, preceded by definitions of the special tokens that it uses (bos_token, ...), so that it is complete."""
    path = folder / "tokenizer_config.json"
    if template is None or not path.exists():
        return template
    described, values = json_object(path), {}
    for name in re.findall(r"\b(?:bos|eos|pad|unk)_token\b", template):
        value = described.get(name)
        values[name] = value.get("content") if isinstance(value, dict) else value
    # Not escaped to ASCII: Jinja would not join an escaped pair of surrogates to one character again.
    written = {n: json.dumps(v, ensure_ascii=False) for n, v in values.items() if isinstance(v, str)}
    return "".join(f"{{% set {n} = {v} %}}" for n, v in written.items()) + template


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _from_gguf(path: Path, dtype: torch.dtype | None, wants_tokenizer: bool) -> Pretrained:
    with path.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(
                f"{path} is not a GGUF file: give one, or the folder in which the weights and config.json are"
            )
    file = GGUFFile(path)
    embedding, kind = file.tensors.get("token_embd.weight"), file.metadata.get("general.architecture")
    if embedding is None:
        raise ValueError(f"{path} has no token_embd.weight: it is not a language model")
    tied = "output.weight" not in file.tensors
    config = _config(
        file.metadata,
        f"{kind}.",
        lambda found: config_from_gguf(found, vocab_size=embedding.shape[0], tied=tied),
        str(path),
    )
    words = None
    if wants_tokenizer:
        words = _tokenizer(lambda: tokenizer_of_metadata(file.metadata, str(path)), config, str(path))
    template = _text(file.metadata.get("tokenizer.chat_template"), f"{path}: tokenizer.chat_template")
    family = GGUF_LLAMA if kind == "llama" else GGUF_QWEN3
    return Pretrained(_filled(config, Dequantised(file), family, dtype, str(path)), words, template)


# --- both -------------------------------------------------------------------------------------------------------------


def _config(
    described: Mapping[str, Any], prefix: str, read: Callable[[Mapping[str, Any]], ModelConfig], where: str
) -> ModelConfig:
    """Our config. Raises ValueError that names the file and, where it is known, the field."""
    # A null field counts as missing, except for Mistral's window: missing means 4,096 there, and null means no window.
    given = {key: value for key, value in described.items() if value is not None or key == "sliding_window"}
    try:
        _check_fields(given, prefix)
        return read(given)
    except (ValueError, *WRONG) as error:
        what = f"it has no usable {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: {what}") from error


def _check_fields(given: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in given.items():
        name, kind = key.removeprefix(prefix), type(value)
        if value is None:
            continue
        if name in WHOLE and not (kind is int and 1 <= value <= LARGEST):
            raise ValueError(f"{key} is {reprlib.repr(value)}, not a whole number from 1 to {LARGEST:,}")
        if name in REAL and not (kind in (int, float) and 0 <= value <= 1e30):
            raise ValueError(f"{key} is {reprlib.repr(value)}, not a number from 0 to 1e30")
        if name in KINDS and kind is not KINDS[name]:
            raise ValueError(f"{key} is {reprlib.repr(value)}, not a {KINDS[name].__name__}")
        if KINDS.get(name) is dict:
            _check_fields(value)


def _tokenizer(read: Callable[[], BPETokenizer], config: ModelConfig, where: str) -> BPETokenizer:
    try:
        made = read()
    except (RecursionError, regex.error, *WRONG) as error:
        raise ValueError(f"{where}: no readable tokenizer: {error}") from error
    odd = [i for i in (*made.tokens, *made.specials.values()) if type(i) is not int or i < 0]
    odd += [name for name in made.specials if not isinstance(name, str)]
    if odd:
        raise ValueError(f"{where}: the tokenizer has the id or special token {odd[0]!r}")
    if made.vocab_size > config.vocab_size:  # fewer is usual: many models pad their embedding with unused rows
        raise ValueError(
            f"{where}: the tokenizer makes {made.vocab_size} ids, the model has rows for {config.vocab_size}: "
            "they do not belong together"
        )
    return made


def _text(found: Any, where: str) -> str | None:
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{where} is {reprlib.repr(found)}, not a text")
    return found


def _turns(config: ModelConfig) -> bool:
    try:
        return bool(rope_frequencies(config)[0].isfinite().all())
    except (ValueError, ArithmeticError):  # logarithms and quotients of zero
        return False


def _filled(
    config: ModelConfig, theirs: Shards | Dequantised, family: Family, dtype: torch.dtype | None, where: str
) -> Transformer:
    """The model with every parameter filled from `theirs`. Raises ValueError if one is missing, left over, or not finite."""
    try:
        names = matched(config, theirs.shapes, family)
        if config.positions == "rope" and not _turns(config):
            raise ValueError("the rope parameters of the config give no finite frequencies")
    except (ValueError, *WRONG) as error:
        raise ValueError(f"{where}: {error}") from error
    dtype = dtype or NUMBER_FORMATS[theirs.formats[names["embedding.weight"]]]
    with without_storage():
        model = Transformer(config)
    # Allocate all parameters before reading: interleaving long-lived weights with temporary file buffers would fragment the
    # heap. torch.empty costs no memory until it is written.
    state = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.named_parameters()}
    for name, tensor in renamed(theirs, names, family, config):
        state[name].copy_(tensor)  # a copy: the tensor may be a view of a larger one, which would stay in memory
        del tensor  # before the next one is read
        if not bool(torch.isfinite(state[name].sum(dtype=torch.float32))) and not state[name].isfinite().all():
            raise ValueError(
                f"{where}: {names[name]} holds infinities or NaN{' in ' + str(dtype) if dtype.itemsize < 4 else ''}"
            )
    if config.tied:
        if family.head in theirs.shapes and not torch.equal(theirs[family.head].to(dtype), state["embedding.weight"]):
            raise ValueError(f"{where}: the config ties the head to the embedding, and {family.head} is another matrix")
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embedding.weight  # one parameter again, not two with one storage
    return model.eval()
