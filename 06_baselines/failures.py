"""June's failure gallery: weights of other people that load without a word, and are another model.

The published models are tiny random ones of transformers, with weights of norms and biases that are no ones and zeros. A
bug is a wrong loader: one function of `common.pretrained` exchanged, or a short loader with the wrong line in it. Nobody has
to train anything to see them, because the reference is there; and without the reference hardly anybody would.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from common.diagnostics.core import Failure, Specimen, replaced
from common.diagnostics.handles import handles_of
from common.generation import cached, decode, engine
from common.generation.decode import GrowingRow, recompute
from common.generation.engine import Engine
from common.generation.prepacked import prepacked
from common.generation.sampling import SamplingParams, probabilities
from common.model import transformer
from common.model.config import ModelConfig
from common.model.logprobs import token_logprobs
from common.model.surgery import replace_linears
from common.model.transformer import Transformer
from common.pretrained import configs, export, load, names
from common.pretrained.configs import config_from_hf
from common.pretrained.load import Pretrained, load_pretrained
from common.tokenization import interop
from common.tokenization.bpe import BPETokenizer
from common.tokenization.byte import ByteTokenizer
from common.tokenization.chat import encode_chat
from common.tokenization.protocol import END_OF_TEXT
from common.training.checkpoint import (
    load_checkpoint,
    load_tensors,
    model_fingerprint,
    save_checkpoint,
    trainable_names,
)

MONTH = "06_baselines"
Loader = Callable[[Mapping[str, Tensor], dict[str, Any], str], nn.Module]  # (tensors, config, name of the folder)


# --- what was published -----------------------------------------------------------------------------------------------

LLAMA = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
LONG = {
    "rope_type": "llama3", "rope_theta": 1_000_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, rope_parameters=LONG),
    "fresh": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True),
    "tied": lambda: transformers.LlamaConfig(**{**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=24),
    "bf16": lambda: transformers.LlamaConfig(
        **{**LLAMA, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1},
        dtype="bfloat16",
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A model of somebody else: it runs there, and its files are a config and named tensors."""

    module: nn.Module
    described: dict[str, Any]
    tensors: dict[str, Tensor]


@cache
def published(kind: str) -> Published:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        config = CONFIGS[kind]()
        module = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and kind != "fresh":
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("embed_tokens.weight"):
                parameter.mul_(0.02 / config.initializer_range)  # small, as in trained models
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return Published(module, json.loads(config.to_json_string(use_diff=False)), tensors)


# --- what is made of it -----------------------------------------------------------------------------------------------


def load_folder(tensors: Mapping[str, Tensor], described: dict[str, Any], name: str) -> nn.Module:
    """The files, in a folder of that name, through our own loader."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(described))
        safetensors.torch.save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return load_pretrained(folder, tokenizer=False).model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers draws a bar for each file, and warns at length."""
    bars, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def exported(model: Transformer, spoil: Callable[[Path], None] | None = None) -> nn.Module:
    """Written by our exporter, read by transformers. `spoil` is what happens to the folder in between."""
    with tempfile.TemporaryDirectory() as place, quiet():
        folder = export.export_hf(Pretrained(model, None, None), Path(place) / "model")
        if spoil:
            spoil(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def greedy(model: nn.Module) -> Callable[[list[int], int], list[int]]:
    def write(prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return write


def reference_greedy(module: nn.Module) -> Callable[[list[int], int], list[int]]:
    def write(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        made = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
        return made[0, len(prompt) :].tolist()

    return write


def next_probabilities(model: nn.Module, allowed: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """What the engine draws from at temperature 1. `allowed` (V,) is True for the ids that are tokens."""

    def draw(ids: Tensor) -> Tensor:
        rows = [GrowingRow(row, SamplingParams()) for row in ids.tolist()]
        logits = recompute(model, rows)
        logits = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
        return probabilities(logits, SamplingParams())

    return draw


OF_A_MODEL = ("model", "module", "vocab_size", "padded", "open_cache", "hidden", "parameter_count")


def room(kind: str = "llama", loader: Loader = load_folder) -> Specimen:
    """Ours beside theirs, with whatever `common.pretrained` is at this moment."""
    source = published(kind)
    ours, theirs = loader(source.tensors, source.described, kind), source.module
    made = handles_of(ours)
    return {
        **{name: made[name] for name in OF_A_MODEL},
        "expected_parameters": theirs.num_parameters(),
        "reference_model": theirs,
        "reference_hidden": handles_of(theirs)["hidden"],
        "reference_context": source.module.config.max_position_embeddings,
        "context_length": ours.context_length,
        "checkpoint": source.tensors,
        "load_foreign": lambda tensors: loader(tensors, source.described, kind),
        "load_named": lambda name: loader(source.tensors, source.described, name),
        "greedy": greedy(ours),
        "reference_greedy": reference_greedy(theirs),
        "next_probabilities": next_probabilities(ours),
        "exported": lambda: exported(ours),
    }


def in_use(kind: str = "llama", loader: Loader = load_folder) -> Specimen:
    """The same without the handles that ask about the file: where it is read rightly, they only take time."""
    made = room(kind, loader)
    return {name: made[name] for name in made if name not in ("checkpoint", "load_foreign")}


def healthy() -> Specimen:
    """A Llama with biases, a base of a million, and a context stretched from 64 tokens to 256."""
    return room()


def gpt2() -> Specimen:
    return room("gpt2")


def fresh() -> Specimen:
    """A Llama as it is initialised: biases are zeros and weights of norms are ones."""
    return room("fresh")


def tied() -> Specimen:
    return room("tied")


def mistral() -> Specimen:
    """Each token sees 24, itself among them."""
    return room("mistral")


def bf16() -> Specimen:
    """Both sides in bf16, where rounding alone moves logits by some hundredths of their deviation."""
    made = room("bf16")
    kept = ("model", "module", "vocab_size", "parameter_count", "expected_parameters", "reference_model",
            "reference_context", "context_length")  # fmt: skip
    return {**{name: made[name] for name in kept}, "parity_tolerance": 0.15}


def of_llama_cpp() -> dict[str, Tensor]:
    """The tensors under llama.cpp's names, rows of Q and K in the order in which llama.cpp turns them."""
    source, found = published("tied"), {}
    for ours, theirs in names.LLAMA.items():
        for layer in range(source.described["num_hidden_layers"]) if "{i}" in ours else [0]:
            name = theirs.format(i=layer, p="weight")
            if name not in source.tensors:
                continue
            tensor = source.tensors[name]
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # as its converter does
                heads = source.described["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            found[names.GGUF[ours].format(i=layer, p="weight")] = tensor.contiguous()
    return found


def load_gguf(tensors: Mapping[str, Tensor], described: dict[str, Any], name: str) -> nn.Module:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(described["max_position_embeddings"])
        writer.add_block_count(described["num_hidden_layers"])
        writer.add_embedding_length(described["hidden_size"])
        writer.add_head_count(described["num_attention_heads"])
        writer.add_head_count_kv(described["num_key_value_heads"])
        writer.add_feed_forward_length(described["intermediate_size"])
        writer.add_layer_norm_rms_eps(described["rms_norm_eps"])
        writer.add_rope_freq_base(described["rope_parameters"]["rope_theta"])
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor.numpy())
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return load_pretrained(path, tokenizer=False).model


def llama_cpp() -> Specimen:
    """The tied Llama in a GGUF file: such a file has no field that says so, only one tensor less."""
    tensors, described = of_llama_cpp(), published("tied").described
    return {
        **room("tied", lambda *_: load_gguf(tensors, described, "model")),
        "checkpoint": tensors,
        "load_foreign": lambda changed: load_gguf(changed, described, "model"),
        "load_named": lambda name: load_gguf(tensors, described, name),
    }


def padded_vocabulary(mask: bool = True) -> Specimen:
    """40 tokens, and 48 rows for speed. The last 8 are zeros, as their padding left them."""
    source = published("llama")
    tensors = {name: tensor.clone() for name, tensor in source.tensors.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][40:] = 0.0
    model = load_folder(tensors, source.described, "padded")
    made = handles_of(model)
    return {
        **{name: made[name] for name in OF_A_MODEL},
        "next_probabilities": next_probabilities(model, torch.arange(48) < 40 if mask else None),
        "makeable_ids": set(range(40)),
    }


def with_mask() -> Specimen:
    return padded_vocabulary()


BEGIN = "<|begin|>"
TEMPLATE = (
    BEGIN + "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
OPENS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {BEGIN: {"id": BEGIN, "ids": [0], "tokens": [BEGIN]}},
}


@cache
def tokenizer_file() -> str:
    """A tokenizer.json whose special tokens come first, 0 to 2, and that puts the first of them in front of a text."""
    learned = BPETokenizer.train(["to be or not to be, that is the question " * 4], 280, specials=[])
    moved = BPETokenizer(
        {token + 3: raw for token, raw in learned.tokens.items()},
        [(a + 3, b + 3) for a, b in learned.merges],
        learned.pattern,
        {BEGIN: 0, "<|start|>": 1, "<|end|>": 2},
    )
    return json.dumps({**json.loads(interop.to_hf_json(moved)), "post_processor": OPENS})


@cache
def their_words(opens: bool = True) -> Any:
    """The same file in transformers."""
    text = tokenizer_file() if opens else json.dumps({**json.loads(tokenizer_file()), "post_processor": None})
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "tokenizer.json").write_text(text, encoding="utf-8")
        made = transformers.PreTrainedTokenizerFast(tokenizer_file=str(Path(place) / "tokenizer.json"))
    made.chat_template = TEMPLATE
    return made


def words() -> Specimen:
    """Ours and theirs, from one file."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "tokenizer.json").write_text(tokenizer_file(), encoding="utf-8")
        ours = interop.from_hf_json(Path(place) / "tokenizer.json")
    theirs = their_words()
    render = partial(theirs.apply_chat_template, add_generation_prompt=True, tokenize=True, return_dict=False)
    return {
        "encode": ours.encode,
        "decode": ours.decode,
        "reference": partial(theirs.encode, add_special_tokens=False),
        "token_length": lambda token: len(ours.token_bytes(token)),
        "special_ids": ours.specials,
        "opening": BEGIN,
        "prompt_ids": lambda text: [ours.specials[BEGIN], *ours.encode(text)],
        "conversation_ids": lambda messages: encode_chat(messages, TEMPLATE, ours).ids,
        "reference_conversation_ids": render,
    }


# --- what is done to a model before it is used ------------------------------------------------------------------------

SMALL = ModelConfig(vocab_size=48, context_length=64, layers=2, width=32, heads=4, init="fan_in")


class KeptAside(nn.Module):
    """x W^T + b with W rearranged and kept as an attribute: no parameter and no buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.columns = linear.weight.detach().T.contiguous()
        self.shift = 0.0 if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.columns + self.shift


def rearranged(model: nn.Module) -> nn.Module:
    """Every matrix in another layout, for speed; also where a module is more than its matrix."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, KeptAside(child))
    return model.eval()


def answers(model: nn.Module) -> Specimen:
    """What can be asked of a model that is not trained any more."""
    found = handles_of(model)
    return {name: found[name] for name in ("model", "vocab_size", "padded", "open_cache")}


def identified(rearrange: Callable[[nn.Module], nn.Module]) -> Specimen:
    """A model that is rearranged, evaluated, and its results kept under the fingerprint."""
    plain = Transformer(SMALL, seed=1).eval()

    def fingerprint_with(tensors: Mapping[str, Tensor]) -> str:
        model = Transformer(SMALL)
        load_tensors(model, tensors, "the probe")
        return model_fingerprint(rearrange(model.eval()))

    return {
        **answers(rearrange(Transformer(SMALL, seed=1).eval())),
        "reference_model": plain,
        "checkpoint": dict(plain.named_parameters()),
        "fingerprint_with": fingerprint_with,
    }


def fingerprinted() -> Specimen:
    return identified(prepacked)


class LowRank(nn.Module):
    """x W^T + x A^T B^T around a linear module (Hu et al. 2021), the smallest form that works."""

    def __init__(self, linear: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = linear
        self.a = nn.Parameter(torch.empty(rank, linear.in_features).normal_(generator=torch.Generator().manual_seed(1)))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class LowRankLinear(nn.Linear):
    """The same as a kind of linear module."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.a = nn.Parameter(torch.empty(2, linear.in_features).normal_(generator=torch.Generator().manual_seed(1)))
        self.b = nn.Parameter(torch.zeros(linear.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


def adapted(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A frozen model with adapters on its queries and values."""
    model = Transformer(SMALL, seed=1).requires_grad_(False).eval()
    replace_linears(model, lambda _, linear: make(linear), lambda name, _: name.endswith(("query", "value")))
    return model


def transformed(make: Callable[[nn.Linear], nn.Module], rearrange: Callable[[nn.Module], nn.Module]) -> Specimen:
    """A model with adapters, and what is done to it between training and use."""

    def saved_and_loaded(model: nn.Module) -> nn.Module:
        with tempfile.TemporaryDirectory() as place:
            save_checkpoint(place, model, ByteTokenizer(), only=trainable_names(model))
            return load_checkpoint(place, ByteTokenizer(), onto=adapted(make))

    return {
        **answers(adapted(make)),
        "reference_model": Transformer(SMALL, seed=1).eval(),  # as long as nothing is learned
        "adapted": adapted(make),
        "transformations": {"rearranged for speed": rearrange, "saved and loaded": saved_and_loaded},
    }


def with_adapters() -> Specimen:
    return transformed(LowRank, prepacked)


class Forty:
    """40 tokens of one byte each, of which the last ends a document."""

    vocab_size, specials, fingerprint = 40, {END_OF_TEXT: 39}, "forty"

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == 39 else bytes([48 + token_id])


def an_engine() -> Specimen:
    """An engine on a model that is still being trained: it has dropout, and 48 rows for the 40 tokens."""
    config = ModelConfig(vocab_size=48, context_length=64, layers=2, width=32, heads=4, init="fan_in", dropout=0.2)
    module = Transformer(config, seed=0).eval()
    asked, made = Engine(module, Forty(), ends=()), handles_of(module)

    def most_probable(prompt: list[int], count: int) -> list[int]:
        ((one,),) = asked.generate([prompt], SamplingParams(temperature=0, max_tokens=count))
        return one.ids

    def generated_logprobs(prompts: list[list[int]], seed: int) -> list[tuple[list[int], list[float]]]:
        completions = asked.generate(prompts, SamplingParams(max_tokens=12, seed=seed, logprobs=True))
        return [(one.ids, one.logprobs) for (one,) in completions]

    def remembering() -> Callable[[list[int], int], list[int]]:
        keeping = Engine(module, Forty(), ends=(), remember=True)

        def answer(prompt: list[int], count: int) -> list[int]:
            text = "".join(keeping.stream(prompt, SamplingParams(temperature=0, max_tokens=count)))
            return [byte - 48 for byte in text.encode()]

        return answer

    return {
        **{name: made[name] for name in ("model", "module", "vocab_size", "padded", "open_cache")},
        "makeable_ids": set(range(39)),
        "greedy": most_probable,
        "generated_logprobs": generated_logprobs,
        "score_tokens": lambda prompts, continuations: [one.logprobs for one in asked.score(prompts, continuations)],
        "remembering": remembering,
    }


# --- the bugs ---------------------------------------------------------------------------------------------------------


def as_stored() -> Iterator[Specimen]:
    """Rows of Q and K stay in the order of the file."""
    return replaced(load, "GGUF_LLAMA", replace(names.GGUF_LLAMA, shaped=names.HF_LLAMA.shaped), llama_cpp)


def permuted_needlessly() -> Iterator[Specimen]:
    """Every Llama is taken for one whose rows were reordered."""
    return replaced(names, "HF_LLAMA", replace(names.HF_LLAMA, shaped=names.GGUF_LLAMA.shaped), healthy)


def by_the_quotient() -> Iterator[Specimen]:
    """Four query heads and one key head: 4 // 1 for 1. With 64 and 8 it comes out right."""
    right = names.GGUF_LLAMA.shaped

    def wrong(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
        if "attention.key." in name:
            return names.rows_to_half(tensor, config.heads // config.groups)
        return right(name, tensor, config)

    return replaced(load, "GGUF_LLAMA", replace(names.GGUF_LLAMA, shaped=wrong), llama_cpp)


def transposed_where_it_shows() -> Iterator[Specimen]:
    """Turned around if the shape demands it: a square matrix demands nothing."""
    right = names.HF_GPT2.shaped

    def wrong(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
        made = right(name, tensor, config)
        return made.T if name.endswith("attention.output.weight") else made

    return replaced(names, "HF_GPT2", replace(names.HF_GPT2, shaped=wrong), gpt2)


def leniently(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    """What has a name that we know is taken, and the rest is forgiven on both sides."""
    model, family, found = Transformer(config), names.family_of(config), {}
    for name in model.state_dict():
        source = names.their_name(name, family)
        if source in tensors:
            found[name] = family.shaped(name, tensors[source], config)
    model.load_state_dict(found, strict=False)
    return model.eval()


def not_strict() -> Specimen:
    return room("llama", lambda tensors, described, name: leniently(tensors, config_from_hf(described)))


def head_at_random() -> Specimen:
    """The flag is looked for where it is not, and the head that the file does not have keeps its initial weights."""
    return room("tied", lambda tensors, described, _: leniently(tensors, config_from_hf(described).but(tied=False)))


def tied_by_default() -> Specimen:
    """The config is taken for a tied one, and the head of the file for a copy of the embedding."""

    def loader(tensors: Mapping[str, Tensor], described: dict[str, Any], name: str) -> nn.Module:
        rest = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
        return load_folder(rest, described | {"tie_word_embeddings": True}, name)

    return room("llama", loader)


def biases_left_out() -> Specimen:
    """A Llama has none, so the config is read without them, and what the file has is left over."""
    return room(
        "fresh", lambda tensors, described, _: leniently(tensors, config_from_hf(described).but(attention_bias=False))
    )


def default_epsilon() -> Iterator[Specimen]:
    """Asked for under GPT-2's name, which a Llama's config does not have."""

    def wrong(theirs: Mapping[str, Any]) -> ModelConfig:
        return config_from_hf(theirs).but(norm_epsilon=theirs.get("layer_norm_epsilon", 1e-5))

    return replaced(load, "config_from_hf", wrong, healthy)


def default_base() -> Iterator[Specimen]:
    """Asked for where it stood in older files."""

    def wrong(theirs: Mapping[str, Any]) -> ModelConfig:
        return config_from_hf(theirs).but(rope_base=theirs.get("rope_theta", 10_000.0))

    return replaced(load, "config_from_hf", wrong, healthy)


def window_not_read() -> Iterator[Specimen]:
    return replaced(
        load, "config_from_hf", lambda theirs: config_from_hf(theirs).but(window=None), partial(in_use, "mistral")
    )


def original_context() -> Iterator[Specimen]:
    """The length before it was stretched."""

    def wrong(theirs: Mapping[str, Any]) -> ModelConfig:
        return config_from_hf(theirs).but(context_length=theirs["rope_parameters"]["original_max_position_embeddings"])

    return replaced(load, "config_from_hf", wrong, in_use)


def angles_cast() -> Iterator[Specimen]:
    """model.to(bfloat16) takes the table of frequencies along, and a position times a bf16 number is a bf16 number."""

    def wrong(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] * frequencies.to(torch.bfloat16)
        return angles.float().cos() * factor, angles.float().sin() * factor

    return replaced(transformer, "rope_angles", wrong, bf16)


def one_gelu() -> Iterator[Specimen]:
    """gelu_new is the tanh form, gelu the exact one."""
    return replaced(configs, "ACTIVATIONS", {**configs.ACTIVATIONS, "gelu_new": "gelu"}, gpt2)


def gate_and_up_exchanged() -> Iterator[Specimen]:
    table = dict(names.LLAMA)
    gate, up = "blocks.{i}.mlp.gate.{p}", "blocks.{i}.mlp.up.{p}"
    table[gate], table[up] = table[up], table[gate]
    return replaced(names, "HF_LLAMA", replace(names.HF_LLAMA, names=table), healthy)


def into_copies(tensors: Mapping[str, Tensor], described: dict[str, Any], name: str) -> nn.Module:
    """Query, key and value are one matrix for speed, which a hook puts together whenever it is asked for."""
    config = config_from_hf(described)
    found, model = names.tensors_from_hf(tensors, config), Transformer(config)
    state = model.state_dict()
    for layer in range(config.layers):
        parts = [f"blocks.{layer}.attention.{part}.weight" for part in ("query", "key", "value")]
        fused = torch.cat([state[part] for part in parts])  # a copy
        fused.copy_(torch.cat([found.pop(part) for part in parts]))  # and nobody looks at it again
    for part, tensor in found.items():
        state[part].copy_(tensor)
    return model.eval()


def loaded_into_a_copy() -> Specimen:
    return room("llama", into_copies)


def by_name(tensors: Mapping[str, Tensor], described: dict[str, Any], name: str) -> nn.Module:
    """What a config lacks is known of the family, and the family by its name."""
    if "Llama-3" in name:  # which CodeLlama-34b contains
        described = {**described, "rope_parameters": {**described["rope_parameters"], "rope_theta": 500_000.0}}
    return load_folder(tensors, described, name)


def family_by_substring() -> Specimen:
    return in_use("llama", by_name)


def listed_and_not_written(folder: Path) -> None:
    """The index is made of the model's names, the files of the tensors that are not tied."""
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    (folder / second).write_bytes(b"")
    held = safetensors.torch.load_file(folder / first)
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(held, first), "lm_head.weight": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_tied_shard() -> Specimen:
    made = in_use("tied")
    return {**made, "exported": lambda: exported(made["model"], listed_and_not_written)}


def base_not_exported(folder: Path) -> None:
    """The table of fields has no entry for it."""
    described = json.loads((folder / "config.json").read_text())
    del described["rope_theta"], described["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(described))


def base_lost_on_export() -> Specimen:
    made = in_use()
    return {**made, "exported": lambda: exported(made["model"], base_not_exported)}


def padded_rows() -> Specimen:
    return padded_vocabulary(mask=False)


def appended_specials() -> Iterator[Specimen]:
    """Added tokens come after the others, whatever ids the file gives them."""
    right = interop.from_hf_json

    def wrong(source: Path) -> BPETokenizer:
        made = right(source)
        specials = {name: 1 + max(made.tokens) + i for i, name in enumerate(made.specials)}
        return BPETokenizer(made.tokens, made.merges, made.pattern, specials, made.rules)

    return replaced(interop, "from_hf_json", wrong, words)


def double_bos() -> Specimen:
    """The four lines of the thread."""
    theirs = their_words()

    def conversation_ids(messages: Sequence[Mapping[str, str]]) -> list[int]:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return theirs(text).input_ids

    return {**words(), "conversation_ids": conversation_ids}


def no_bos() -> Specimen:
    """add_special_tokens=True adds what the tokenizer's file says, and this one says nothing."""
    theirs = their_words(opens=False)
    return {**words(), "prompt_ids": lambda text: theirs(text, add_special_tokens=True).input_ids}


def scored_over_all_rows() -> Iterator[Specimen]:
    """Generation cuts the rows that are no tokens, because they must not be drawn. Scoring draws nothing, and keeps them."""

    def wrong(logits: Tensor, ids: Tensor, *, vocab_size: int, temperature: float = 1.0) -> Tensor:
        return token_logprobs(logits, ids, vocab_size=logits.shape[-1], temperature=temperature)

    return replaced(engine, "token_logprobs", wrong, an_engine)


def mode_set_once() -> Iterator[Specimen]:
    """The engine calls eval() when it is made, and never again."""
    return replaced(decode, "evaluation_mode", lambda modules: contextlib.nullcontext(), an_engine)


def stale_prefix() -> Iterator[Specimen]:
    """What was remembered is taken to be of these weights, whatever has happened to them."""
    return replaced(cached.Weights, "are_those_of", lambda self, model: True, an_engine)


# --- the entries ------------------------------------------------------------------------------------------------------

ALIVE = ("repeatable", "future-perturbation", "cross-row", "parameters-move")
WORKS = ("padding-invariance", "cached-equals-uncached", *ALIVE)
FILE = ("loads-or-refuses", "every-tensor-counts")
SAME = ("greedy-parity", "logit-parity", "layer-parity", "parameter-count")
TEXT = ("round-trip", "reference-ids", "injection", "byte-lengths")
RUNS = ("logit-parity", "padding-invariance", "cached-equals-uncached", "future-perturbation")
Entry = partial(Failure, month=MONTH)

FAILURES = [
    Entry(
        id="baselines/interleaved",
        title="Rows of Q and K stay in the order of the file",
        story="llama.cpp and Meta turn neighbouring coordinates, Hugging Face those half a head apart, and converters "
        "reorder the rows of Q and K in between. Without that the model writes gibberish after 20 tokens or more in one "
        "thread, after one or two in another: position 0 turns nothing, so the first token is right.",
        source="karpathy/llama2.c#286, NeuraLegion/shainet#111, huggingface/nanotron#427",
        symptom="a loss well above the model's; text that begins well and falls apart; first divergence: the query of "
        "layer 0",
        fix="Undo the reordering when the file is read; compare at the second token and not at the first.",
        broken=as_stored,
        healthy=llama_cpp,
        probe="logit-parity",
        blind_spots=("parameter-count", "export-reload", "name-invariance", *FILE, *WORKS),
    ),
    Entry(
        id="baselines/permuted-needlessly",
        title="Rows are reordered that were in order",
        story="What Llama 2 needed is done to a file that does not need it. In the thread the script for Llama 3 runs "
        "without errors, and the converted models are really bad.",
        source="AI-Hypercomputer/maxtext#1774",
        symptom="as without the reordering: a good first token, and then none; first divergence: the query of layer 0",
        fix="Let the format of the file decide, and try the loader on two families.",
        broken=permuted_needlessly,
        healthy=healthy,
        probe="logit-parity",
        blind_spots=("parameter-count", "export-reload", "name-invariance", *FILE, *WORKS),
    ),
    Entry(
        id="baselines/key-heads",
        title="Keys are reordered by the wrong number of heads",
        story="Where several query heads share a key head, the converter divided one number by the other. Llama 2 70B "
        "has 64 and 8, and 64 / 8 is 8: it came out right, until TinyLlama was converted and wrote gibberish.",
        source="ggml-org/llama.cpp#3364, jzhang38/TinyLlama#24, huggingface/transformers#31788",
        symptom="queries agree and keys do not; no model with as many key heads as query heads shows it",
        fix="Reorder keys by the key heads; test a model whose head counts give no chance agreement.",
        broken=by_the_quotient,
        healthy=llama_cpp,
        probe="logit-parity",
        blind_spots=("parameter-count", "export-reload", "name-invariance", *FILE, *WORKS),
    ),
    Entry(
        id="baselines/conv1d",
        title="A square matrix of GPT-2 is not transposed",
        story="GPT-2 keeps its matrices as (inputs, outputs), and whoever forgets to turn them is told so by the shapes: "
        "except for the one that is square. The errors in one thread name every matrix of a block but that one; in "
        "another project a converter turns by shape, and cannot tell where two dimensions are equal.",
        source="AutoGPTQ/AutoGPTQ#140, karpathy/nanoGPT#190, huggingface/transformers#47031",
        symptom="nothing while loading; the loss of a damaged model; first divergence: the attention output of layer 0",
        fix="Transpose by name, never by shape.",
        broken=transposed_where_it_shows,
        healthy=gpt2,
        probe="logit-parity",
        blind_spots=("parameter-count", "export-reload", "name-invariance", *FILE, *WORKS),
    ),
    Entry(
        id="baselines/not-strict",
        title="Names that do not fit are skipped",
        story="strict=False forgives what is missing. Today's file loads perfectly; tomorrow's has another prefix, and "
        "in one thread every layer was initialised at random with a warning, in the other keys and values were zeros.",
        source="huggingface/transformers#45953, TransformerLensOrg/TransformerLens#1620",
        symptom="none with the file at hand; with another one a loss near that of a random model",
        fix="Refuse a checkpoint with anything missing or left over, and say which names.",
        broken=not_strict,
        healthy=healthy,
        probe="loads-or-refuses",
        blind_spots=("long-range-parity", "export-reload", "every-tensor-counts", *SAME, *WORKS),
    ),
    Entry(
        id="baselines/head-at-random",
        title="A tied head is left at random",
        story="The file has no output matrix, because it is the embedding; the loader looks for the flag in the wrong "
        "place and finds it off. In the thread a Ministral wrote gibberish.",
        source="huggingface/transformers#43429, tinygrad/tinygrad#13796",
        symptom="a loss as before training, noise for text; hidden states agree to the last, only the logits differ",
        fix="Make a missing head an error unless the config ties it.",
        broken=head_at_random,
        healthy=tied,
        probe="logit-parity",
        blind_spots=("layer-parity", "every-tensor-counts", "export-reload", "name-invariance", *WORKS),
    ),
    Entry(
        id="baselines/tied-by-default",
        title="A head of its own is thrown away",
        story="Some models tie head and embedding, so the loader does, and the matrix in the file is passed over. The "
        "thread is about the same assumption in another library.",
        source="deepspeedai/DeepSpeed#4088",
        symptom="hidden states agree to the last, and the logits have nothing to do with them",
        fix="Read the flag; ask of every tensor in the file whether the model depends on it.",
        broken=tied_by_default,
        healthy=healthy,
        probe="every-tensor-counts",
        blind_spots=("layer-parity", "loads-or-refuses", "export-reload", "name-invariance", *WORKS),
    ),
    Entry(
        id="baselines/epsilon",
        title="The default epsilon for the model's",
        story="A Llama's norm adds 1e-5 or 1e-6, as its config says; a default is right for one of them. A pull request "
        "works out that activations with a mean square of 4e-4 feel it by 2 % under the root.",
        source="foundation-model-stack/foundation-model-stack#99, paiml/aprender#1606",
        symptom="nearly the right loss; text that differs now and then; first divergence: the first norm, where the "
        "stream is smallest",
        fix="No default: a config without the field is refused.",
        broken=default_epsilon,
        healthy=healthy,
        probe="logit-parity",
        blind_spots=("parameter-count", "export-reload", "name-invariance", *FILE, *WORKS),
    ),
    Entry(
        id="baselines/base",
        title="The default rotary base for the model's",
        story="The base was 10,000 for years and nobody read it from the config, or it has moved to another field. Code "
        "Llama, which has a million, then closes parentheses that nobody opened; other reports have plausible short "
        "prompts and lose the thread beyond a thousand tokens.",
        source="google-deepmind/penzai#102, karpathy/llama2.c#356, lyogavin/airllm#368",
        symptom="short texts look right and long ones drift; first divergence: the heads of layer 0, after queries and "
        "keys that agree",
        fix="Read it where this file has it, and compare far out.",
        broken=default_base,
        healthy=healthy,
        probe="long-range-parity",
        blind_spots=("parameter-count", "export-reload", "name-invariance", *FILE, *WORKS),
    ),
    Entry(
        id="baselines/window-not-read",
        title="The window is not read from the config",
        story="Mistral's first model sees 4,096 tokens back. A back end that did not pass the field on saw everything; "
        "and a test with rows shorter than the window passes either way, as a comment in the second thread warns.",
        source="NVIDIA/TensorRT-LLM#12597, Lightning-AI/litgpt#1552",
        symptom="not a bit of difference up to the window, another model beyond it",
        fix="Read the field; compare on rows longer than the window.",
        broken=window_not_read,
        healthy=mistral,
        probe="long-range-parity",
        blind_spots=("export-reload", "name-invariance", *SAME, *WORKS),
    ),
    Entry(
        id="baselines/angles-cast",
        title="Rotary angles in the format of the weights",
        story="Parity was shown in float32; then the model is loaded in bfloat16, and the frequencies go along. A position "
        "times a bf16 frequency is a bf16 number, so far out angles are wrong, and close by they drown in the rounding "
        "that everybody expects.",
        source="huggingface/transformers#29285, EleutherAI/gpt-neox#1003",
        symptom="no difference in short texts that bf16 does not explain; order is lost in long ones",
        fix="Keep positions and frequencies in float32 whatever the weights are in; compare the end of a long row.",
        broken=angles_cast,
        healthy=bf16,
        probe="long-range-parity",
        blind_spots=("logit-parity", "parameter-count", *ALIVE),
    ),
    Entry(
        id="baselines/gelu-by-name",
        title="The name of an activation is taken for another",
        story="gelu, gelu_new, gelu_pytorch_tanh: two functions, and names that do not say which. Gemma was run with the "
        "exact form where it was trained with the approximate one. In one measurement the output moved by 0.35 %, and "
        "the quality by nothing beyond noise.",
        source="OpenNMT/CTranslate2#1658, Lightning-AI/litgpt#1004, kyutai-labs/pocket-tts#278",
        symptom="the same text and, to three digits, the same loss; first divergence: the activation of layer 0",
        fix="A table of names, checked in float32 with a tolerance below the difference.",
        broken=one_gelu,
        healthy=gpt2,
        probe="logit-parity",
        blind_spots=("greedy-parity", "context-agrees", "parameter-count", "export-reload", *FILE, *WORKS),
    ),
    Entry(
        id="baselines/missing-bias",
        title="Biases are left out",
        story='"A Llama has no biases", so the adapter reads none; TinyLlama worked and Qwen2.5 wrote garbage. Here the '
        "test model is a fresh one, whose biases are zeros, and parity is perfect.",
        source="sbryngelson/ANEForge#253, paiml/entrenar#258",
        symptom="none on a model that was never trained, garbage on one that was",
        fix="Refuse tensors that are left over; give test models biases and norm weights that are no zeros and ones.",
        broken=biases_left_out,
        healthy=fresh,
        probe="every-tensor-counts",
        blind_spots=("logit-parity", "long-range-parity", "greedy-parity", "layer-parity", "export-reload", *WORKS),
    ),
    Entry(
        id="baselines/gate-for-up",
        title="Gate and up change places",
        story="The two matrices of a gated MLP have one shape, so nothing objects. In the thread a converter took the "
        "wrong half of a stacked pair; here two names of a table are exchanged, in both directions, so that import and "
        "export together give back the file.",
        source="charlie12345/ROCmFPX#49",
        symptom="fluent garbage or worse, no error at any stage; first divergence: the gate of layer 0",
        fix="Compare with the reference; a round trip through one's own table proves nothing.",
        broken=gate_and_up_exchanged,
        healthy=healthy,
        probe="logit-parity",
        blind_spots=("parameter-count", "name-invariance", *FILE, *WORKS),
    ),
    Entry(
        id="baselines/loaded-into-a-copy",
        title="Tensors are loaded into a copy",
        story="Query, key and value are kept as one matrix, and a hook makes the state_dict out of it. What it hands out "
        "are copies: they are filled in place, every name fits, and the parameters never hear of it.",
        source="pytorch/torchtitan#3794",
        symptom="all keys matched, attention at random; first divergence: the query of layer 0",
        fix="Load with load_state_dict, which calls the hooks; look whether each tensor moves a logit.",
        broken=loaded_into_a_copy,
        healthy=healthy,
        probe="every-tensor-counts",
        blind_spots=("loads-or-refuses", "parameter-count", "export-reload", *WORKS),
    ),
    Entry(
        id="baselines/family-by-substring",
        title="The family is recognised by its name",
        story='"Llama-3" is in the name of CodeLlama-34b, so a converter takes it for a Llama 3. In the thread that '
        "failed loudly; here, which is ours to add, only the rotary base is taken from the family.",
        source="meta-pytorch/gpt-fast#177, Lightning-AI/litgpt#2195",
        symptom="a folder that is renamed becomes another model",
        fix="Decide by fields of the config; where names must decide, compare them whole.",
        broken=family_by_substring,
        healthy=healthy,
        probe="name-invariance",
        blind_spots=("long-range-parity", "context-agrees", "export-reload", *SAME, *WORKS),
    ),
    Entry(
        id="baselines/context",
        title="A context length from another release",
        story="The configs said 8,192 tokens where the models support 131,072. Nothing is computed wrongly: what is too "
        "long is cut off at the front before the model sees it.",
        source="Lightning-AI/litgpt#1779",
        symptom="no difference in any logit of the model; an engine forgets how a long prompt began",
        fix="Compare the number with the publisher's, and the answer to a full row with the reference's.",
        broken=original_context,
        healthy=healthy,
        probe="context-agrees",
        blind_spots=("long-range-parity", "export-reload", "name-invariance", *SAME, *WORKS),
    ),
    Entry(
        id="baselines/empty-shard",
        title="An index that lists what no file holds",
        story="The converter skips the tied head, the index is made from the model's names and lists it, and a file with "
        "nothing in it is written. The export says nothing; whoever loads it gets an error.",
        source="pytorch/torchtitan#3764",
        symptom="none until somebody else loads the model",
        fix="Load every export again, elsewhere, before it counts as written.",
        broken=empty_tied_shard,
        healthy=tied,
        probe="export-reload",
        blind_spots=("long-range-parity", "name-invariance", *SAME, *WORKS),
    ),
    Entry(
        id="baselines/base-not-exported",
        title="The rotary base is lost on the way out",
        story="A converter's table of fields has no entry for rope_theta, and whoever reads what it wrote falls back to "
        "10,000. The weights are right to the bit.",
        source="huggingface/nanotron#188",
        symptom="one's own numbers are good, everybody else's are not, and worse for long texts",
        fix="Read the written config back and compare it field by field; compare logits where it is loaded.",
        broken=base_lost_on_export,
        healthy=healthy,
        probe="export-reload",
        blind_spots=("long-range-parity", "name-invariance", *SAME, *WORKS),
    ),
    Entry(
        id="baselines/padded-rows",
        title="Rows that are no tokens can be drawn",
        story="The vocabulary is padded for speed, and a row of zeros has logit 0, which beats every negative one. In one "
        "thread such an id was sampled after some training, and the next step refused it. It takes zeros or noise: the "
        "padded rows of pythia-70m together get about 1e-30.",
        source="NVIDIA-NeMo/RL#237, tenstorrent/tt-metal#47021, huggingface/transformers#4875",
        symptom="now and then an id that the tokenizer does not know; all probabilities a little too small",
        fix="Mask ids that are no tokens before the softmax.",
        broken=padded_rows,
        healthy=with_mask,
        probe="dead-rows",
        blind_spots=WORKS,
    ),
    Entry(
        id="baselines/appended-specials",
        title="Special tokens get new ids",
        story="Added tokens are numbered from the end of the vocabulary, whatever the file says. In the thread the "
        "tokenizer then had six ids more than the model had rows; where rows are padded there is not even an error.",
        source="InternLM/InternLM#715",
        symptom="plain text is right; in a conversation the model neither sees who speaks nor stops",
        fix="Keep the ids of the file; compare a conversation, not a sentence.",
        broken=appended_specials,
        healthy=words,
        probe="template-parity",
        blind_spots=("one-opening", *TEXT),
    ),
    Entry(
        id="baselines/double-bos",
        title="The template opens, and the tokenizer opens again",
        story="A template is rendered to text, opening token and all, and the text is tokenized as any other, which puts "
        "one more in front. No loss of quality is measured in the threads: it is only not what the model was trained on.",
        source="deepseek-ai/DeepSeek-R1#151, sgl-project/sglang#888, huggingface/open-r1#462",
        symptom="ids that begin 151646, 151646, which nobody prints",
        fix="One place adds it: tokenize rendered text with add_special_tokens=False, and print the ids once.",
        broken=double_bos,
        healthy=words,
        probe="template-parity",
        blind_spots=("one-opening", *TEXT),
    ),
    Entry(
        id="baselines/no-bos",
        title="Nobody adds the opening token",
        story="The harness asks for special tokens, and this tokenizer's file adds none. Two loaders of one model are then "
        "compared on different ids.",
        source="EleutherAI/lm-evaluation-harness#2781",
        symptom="the first tokens of a text are improbable; scores differ from the published ones",
        fix="Compare ids before scores.",
        broken=no_bos,
        healthy=words,
        probe="one-opening",
        blind_spots=("template-parity", *TEXT),
    ),
    Entry(
        id="baselines/blind-fingerprint",
        title="Two models under one fingerprint",
        story="Matrices are rearranged for speed and kept where state_dict() does not look, so a hash of the state sees "
        "embeddings and norms alone: a base model and what was fine-tuned from it have the same. In the threads results are "
        "kept under names that do not depend on the weights, and the second model is given the answers of the first.",
        source="EleutherAI/lm-evaluation-harness#4063, EleutherAI/lm-evaluation-harness#2715, huggingface/lighteval#1364; "
        "the rearranged form is ours",
        symptom="an evaluation that takes no time and finds exactly the numbers of another model",
        fix="Register every tensor that is computed with, or a digest of it; change each weight and look at the hash.",
        broken=lambda: identified(rearranged),
        healthy=fingerprinted,
        probe="fingerprint-sees-every-weight",
        blind_spots=RUNS,
    ),
    Entry(
        id="baselines/adapter-dropped",
        title="An adapter that is a linear module is replaced like one",
        story="The adapter subclasses nn.Linear, and whatever quantises or rearranges a model asks isinstance(module, "
        "nn.Linear), takes the weight and forgets the rest. The model works: it is the base model again.",
        source="pytorch/torchtitan#2288, Lightning-AI/litgpt#352, meta-pytorch/torchtune#1931; that it is dropped is ours",
        symptom="a fine-tuned model that has learned nothing, in deployment only",
        fix="Wrap the module instead of subclassing it; replace exact types only, and refuse a subclass with parameters.",
        broken=lambda: transformed(LowRankLinear, rearranged),
        healthy=with_adapters,
        probe="adapter-survives-transformations",
        blind_spots=RUNS,
    ),
    Entry(
        id="baselines/score-padded-rows",
        title="Scores count rows that are no tokens",
        story="Generation must cut the padded rows of the head, or it draws them; scoring works without, and so its softmax "
        "runs over more rows than the one that was drawn from. Threads about another such pair (renormalised after top-p on "
        "one side, over all tokens on the other) say what follows: the gap enters every ratio of new to old policy.",
        source="vllm-project/vllm#42259, huggingface/trl#6789, NVIDIA-NeMo/RL#237",
        symptom="every scored token a little less probable than when it was generated; ratios that begin below 1",
        fix="One function for the log-probability of a token, over the tokenizer's vocabulary, used by both.",
        broken=scored_over_all_rows,
        healthy=an_engine,
        probe="generate-equals-score",
        blind_spots=("mode-independence", "no-stale-cache", *WORKS),
    ),
    Entry(
        id="baselines/mode-set-once",
        title="Samples are drawn with dropout on",
        story="The engine calls eval() when it is made; the training calls train() before each update, and the next samples "
        "come from a randomly thinned model. In one thread the same greedy decoding gives two different captions for this "
        "reason; in another the guard is added to a trainer whose generator never switches modes itself.",
        source="ruotianluo/self-critical.pytorch#6, unslothai/unsloth-zoo#832, huggingface/trl#3234",
        symptom="greedy text that changes from call to call, and samples that are worse than the evaluation says",
        fix="Set the mode in every call, and put it back afterwards: neither side may rely on the other.",
        broken=mode_set_once,
        healthy=an_engine,
        probe="mode-independence",
        blind_spots=("no-stale-cache", *WORKS),
    ),
    Entry(
        id="baselines/stale-prefix",
        title="Keys and values of weights that are gone",
        story="An engine keeps the keys and values of a prompt for the next request that begins alike, and the weights "
        "change in between. The answer then belongs to neither policy. In one thread cached prefixes were up to 17 updates "
        "old; in others the drift between generated and recomputed log-probabilities gave it away.",
        source="vllm-project/vllm#9744, NVIDIA-NeMo/RL#4018, PrimeIntellect-ai/prime-rl#1650",
        symptom="nothing is wrong at first; the gap between generated and recomputed log-probabilities grows with each "
        "update, and a restart of the engine closes it",
        fix="Tie what is kept to a version of the weights, and drop it when they change.",
        broken=stale_prefix,
        healthy=an_engine,
        probe="no-stale-cache",
        blind_spots=("generate-equals-score", "mode-independence", *WORKS),
    ),
]
