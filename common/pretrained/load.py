"""Somebody else's weights in our model: `load_pretrained(source)`.

Everything that can be wrong with a file is looked for before memory is taken: names, shapes and formats are in the
headers. Then the model is built without storage and filled tensor by tensor, so that a load takes the memory of the weights
and of the largest tensor. Only safetensors, GGUF and JSON are read; a pickle is refused, whatever its name.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from common.foundation.assets import asset, catalogue
from common.foundation.files import read_json
from common.foundation.gguf_file import GGUFFile
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.pretrained.configs import config_from_gguf, config_from_hf
from common.pretrained.names import GGUF_LLAMA, GGUF_QWEN3, Family, family_of, matched, renamed
from common.tokenization.bpe import BPETokenizer
from common.tokenization.interop import from_hf_json, tokenizer_of_metadata
from common.tokenization.protocol import Tokenizer
from common.training.checkpoint import load_with_tokenizer

NUMBER_FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
HUB_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja", "generation_config.json"]  # fmt: skip
WRONG = (KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError)  # what odd JSON does to honest code


class Pretrained(NamedTuple):
    """A model, its tokenizer (None where the folder has none), and the source text of its chat template (likewise)."""

    model: Any
    tokenizer: Tokenizer | None
    chat_template: str | None


def load_pretrained(source: str | Path, *, dtype: torch.dtype | None = None, tokenizer: bool = True) -> Pretrained:
    """Read a model in our form.

    Args:
        source: "smollm2"; a GGUF file; a folder as Hugging Face writes it (GPT-2, Llama, Qwen3, Mistral, Mixtral); one of
            our runs, or a checkpoint in it; or a name on the Hugging Face hub, "owner/model", which is fetched.
        dtype: of the weights in memory; None keeps the format of the file, and float32 where it is quantised.
        tokenizer: False does without one: for files whose tokenizer we cannot read.
    Raises:
        FileNotFoundError: nothing there.
        AssetUnavailable: "smollm2" cannot be fetched.
        ValueError: what is there does not fit; names the file and the field or tensor. No partial model is ever returned.
    """
    name, path = str(source), Path(source)
    if name in catalogue() and not path.exists():
        path = asset(name)
    if path.is_file():
        return _from_gguf(path, dtype, tokenizer)
    if not path.is_dir() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        path = _from_hub(name)
    for ours in (path, path / "model", path / "text"):
        if (ours / "checkpoint.json").exists():
            model, words = load_with_tokenizer(ours)
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


class Shards(Mapping[str, Tensor]):
    """The tensors of the safetensors files of a folder, each read when it is asked for.

    Attributes:
        shapes: of all of them, from the headers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.shapes, self._file = folder, {}, {}
        self.formats: dict[str, str] = {}
        for path in _weight_files(folder):
            try:
                with safetensors.safe_open(path, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118, it is no mapping
                        if name in self.shapes:
                            raise ValueError(f"{path}: {name} is in {self._file[name].name} as well")
                        part = opened.get_slice(name)
                        self.shapes[name], self._file[name] = tuple(part.get_shape()), path
                        self.formats[name] = part.get_dtype()
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read as safetensors: {error}. Fetch it again.") from error
        _check_index(folder, set(self.shapes))

    def __getitem__(self, name: str) -> Tensor:
        """Opened anew each time: what has been read of a mapped file would stay in memory until it is closed."""
        with safetensors.safe_open(self._file[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists() and not index.exists():
        return [single]
    if index.exists():
        names = sorted(set(_json_object(index).get("weight_map", {}).values()))
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} names {name!r}: only safetensors files beside it are read")
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"{folder / name} is missing, which {index.name} names. Fetch the folder again."
                )
        if names:
            return [folder / name for name in names]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    said = (
        ""
        if not pickles
        else (f": it has {pickles[0]}, a pickle, which may run any code when it is read. Convert it where you trust it")
    )
    raise FileNotFoundError(f"{folder} has no model.safetensors{said}")


def _check_index(folder: Path, found: set[str]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = set(_json_object(index)["weight_map"])
        if listed != found:
            odd = sorted(listed ^ found)
            raise ValueError(f"{index} and the files beside it disagree about {len(odd)} tensors, such as {odd[0]}")


def _json_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: is it a folder with a model?")
    try:
        found = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def _from_folder(folder: Path, dtype: torch.dtype | None, wants_tokenizer: bool) -> Pretrained:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder}")
    described = _json_object(folder / "config.json")
    try:
        config = config_from_hf(described)
    except (ValueError, *WRONG) as error:
        what = f"it has no usable {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder / 'config.json'}: {what}") from error
    theirs = Shards(folder)
    odd = [f"{name} ({form})" for name, form in theirs.formats.items() if form not in NUMBER_FORMATS]
    family = family_of(config)
    if odd and not all(family.buffers.search(name.split(" ")[0]) for name in odd):
        raise ValueError(f"{folder}: {odd[0]} is not in {', '.join(NUMBER_FORMATS)}; quantised folders are not read")
    kept = dtype or NUMBER_FORMATS[theirs.formats[next(iter(sorted(theirs.shapes)))]]
    model = _filled(config, theirs, theirs.shapes, family, kept, str(folder))
    words = folder / "tokenizer.json"
    made = from_hf_json(words) if wants_tokenizer and words.exists() else None
    _check_vocabulary(model, made, str(folder))
    return Pretrained(model, made, _template_of(folder))


def _template_of(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "tokenizer_config.json").exists():
        found = _json_object(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        return found
    return None


# --- GGUF -------------------------------------------------------------------------------------------------------------


class Dequantised(Mapping[str, Tensor]):
    """The tensors of a GGUF file, each computed when it is asked for."""

    def __init__(self, file: GGUFFile) -> None:
        self._of, self.shapes = file, {name: stored.shape for name, stored in file.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._of.array(name).copy())

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _from_gguf(path: Path, dtype: torch.dtype | None, wants_tokenizer: bool) -> Pretrained:
    with path.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(
                f"{path} is not a GGUF file: give one, or the folder in which the weights and config.json are"
            )
    file = GGUFFile(path)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{path} has no token_embd.weight: it is not a language model")
    try:
        tied = "output.weight" not in file.tensors
        config = config_from_gguf(file.metadata, vocab_size=embedding.shape[0], tied=tied)
    except (ValueError, *WRONG) as error:
        raise ValueError(f"{path}: {error}") from error
    family = GGUF_LLAMA if file.metadata["general.architecture"] == "llama" else GGUF_QWEN3
    theirs = Dequantised(file)
    model = _filled(config, theirs, theirs.shapes, family, dtype or torch.float32, str(path))
    words = tokenizer_of_metadata(file.metadata, str(path)) if wants_tokenizer else None
    _check_vocabulary(model, words, str(path))
    return Pretrained(model, words, file.metadata.get("tokenizer.chat_template"))


# --- both -------------------------------------------------------------------------------------------------------------


def _filled(
    config: ModelConfig,
    theirs: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    dtype: torch.dtype,
    where: str,
) -> Transformer:
    """The model with every parameter from `theirs`, or ValueError."""
    try:
        names = matched(config, shapes, family)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    with torch.device("meta"):
        model = Transformer(config)
    state = {}
    for name, tensor in renamed(theirs, names, family, config):
        state[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)  # ours, and nobody's view
        del tensor
        if not bool(torch.isfinite(state[name].sum(dtype=torch.float32))) and not state[name].isfinite().all():
            raise ValueError(
                f"{where}: {names[name]} holds infinities or NaN{' in ' + str(dtype) if dtype.itemsize < 4 else ''}"
            )
    if config.tied:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embedding.weight  # one parameter again, not two with one storage
    return model.eval()


def _check_vocabulary(model: Transformer, tokenizer: BPETokenizer | None, where: str) -> None:
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:  # fewer is usual: rows that fill up
        raise ValueError(
            f"{where}: the tokenizer makes {tokenizer.vocab_size} ids, the model has rows for {model.vocab_size}: "
            "they do not belong together"
        )
