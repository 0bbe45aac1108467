"""Names of tensors: a table for each family, and nothing clever.

`transformers` is not imported here: weights are named tensors. The renaming is linear, so it maps gradients as well. What is
checked, is checked on names and shapes, before a single number has been read.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.model.config import ModelConfig
from common.model.initialise import without_storage
from common.model.positions import to_half_layout
from common.model.transformer import Transformer
from common.pretrained.configs import config_from_hf

LLAMA = {  # ours -> theirs; {i} is the layer
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.attention.query.{p}": "model.layers.{i}.self_attn.q_proj.{p}",
    "blocks.{i}.attention.key.{p}": "model.layers.{i}.self_attn.k_proj.{p}",
    "blocks.{i}.attention.value.{p}": "model.layers.{i}.self_attn.v_proj.{p}",
    "blocks.{i}.attention.output.{p}": "model.layers.{i}.self_attn.o_proj.{p}",
    "blocks.{i}.attention.query_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks.{i}.attention.key_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight",
    "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.experts.gate_up_proj",  # first half of dimension 1
    "blocks.{i}.mlp.up": "model.layers.{i}.mlp.experts.gate_up_proj",  # second half
    "blocks.{i}.mlp.down": "model.layers.{i}.mlp.experts.down_proj",
    "blocks.{i}.mlp.gate.{p}": "model.layers.{i}.mlp.gate_proj.{p}",
    "blocks.{i}.mlp.up.{p}": "model.layers.{i}.mlp.up_proj.{p}",
    "blocks.{i}.mlp.down.{p}": "model.layers.{i}.mlp.down_proj.{p}",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
GPT2 = {
    "embedding.weight": "transformer.wte.weight",
    "position_table.weight": "transformer.wpe.weight",
    "blocks.{i}.attention_norm.{p}": "transformer.h.{i}.ln_1.{p}",
    "blocks.{i}.attention.query.{p}": "transformer.h.{i}.attn.c_attn.{p}",  # first third of the last dimension
    "blocks.{i}.attention.key.{p}": "transformer.h.{i}.attn.c_attn.{p}",  # second
    "blocks.{i}.attention.value.{p}": "transformer.h.{i}.attn.c_attn.{p}",  # third
    "blocks.{i}.attention.output.{p}": "transformer.h.{i}.attn.c_proj.{p}",
    "blocks.{i}.mlp_norm.{p}": "transformer.h.{i}.ln_2.{p}",
    "blocks.{i}.mlp.up.{p}": "transformer.h.{i}.mlp.c_fc.{p}",
    "blocks.{i}.mlp.down.{p}": "transformer.h.{i}.mlp.c_proj.{p}",
    "final_norm.{p}": "transformer.ln_f.{p}",
    "head.weight": "lm_head.weight",
}
GGUF = {  # llama.cpp's
    "embedding.weight": "token_embd.weight",
    "blocks.{i}.attention_norm.weight": "blk.{i}.attn_norm.weight",
    "blocks.{i}.attention.query.{p}": "blk.{i}.attn_q.{p}",
    "blocks.{i}.attention.key.{p}": "blk.{i}.attn_k.{p}",
    "blocks.{i}.attention.value.{p}": "blk.{i}.attn_v.{p}",
    "blocks.{i}.attention.output.{p}": "blk.{i}.attn_output.{p}",
    "blocks.{i}.attention.query_norm.weight": "blk.{i}.attn_q_norm.weight",
    "blocks.{i}.attention.key_norm.weight": "blk.{i}.attn_k_norm.weight",
    "blocks.{i}.mlp_norm.weight": "blk.{i}.ffn_norm.weight",
    "blocks.{i}.mlp.gate.{p}": "blk.{i}.ffn_gate.{p}",
    "blocks.{i}.mlp.up.{p}": "blk.{i}.ffn_up.{p}",
    "blocks.{i}.mlp.down.{p}": "blk.{i}.ffn_down.{p}",
    "final_norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}


@dataclass(frozen=True)
class Family:
    """How checkpoints of one kind name and shape what we have, too.

    Attributes:
        names: our name -> theirs.
        shaped: (our name, their tensor, config) -> our tensor.
        buffers: names of theirs that hold no weights: masks and tables of angles, in files of older versions.
        prefix: what files of the bare model, saved without its head, leave away.
        head: their name of the output matrix. Where it is the embedding, a file may hold it all the same.
    """

    names: Mapping[str, str]
    shaped: Callable[[str, Tensor, ModelConfig], Tensor]
    buffers: re.Pattern[str] = re.compile(r"$^")
    prefix: str = ""
    head: str = "lm_head.weight"


def _as_stored(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    if config.experts and name.endswith(("mlp.gate", "mlp.up")):  # experts, stacked
        return tensor.chunk(2, dim=1)[0 if name.endswith("gate") else 1]
    return tensor


def _from_conv1d(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """GPT-2 keeps (inputs, outputs), and query, key and value in one (gallery: baselines/conv1d)."""
    part, _, kind = name.rpartition(".")
    if ".attention." not in name and ".mlp." not in name:
        return tensor
    for place, piece in enumerate(("query", "key", "value")):
        if part.endswith(piece):
            tensor = tensor.chunk(3, dim=-1)[place]
    return tensor.T if kind == "weight" else tensor


def _from_interleaved(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """llama.cpp turns neighbouring coordinates, so its converter reorders the rows of Q and K, in files of the Llama family.

    Ours turns (i, i + D/2), as Hugging Face does (gallery: baselines/interleaved).
    """
    if not re.search(r"attention\.(query|key)\.", name):
        return tensor
    heads = config.heads if ".query." in name else config.groups
    return rows_to_half(tensor, heads)


def rows_to_half(tensor: Tensor, heads: int) -> Tensor:
    """The rows (H·D, ...) of each head from the interleaved to the half layout."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rows_to_interleaved(tensor: Tensor, heads: int) -> Tensor:
    """The way back."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


HF_GPT2 = Family(GPT2, _from_conv1d, re.compile(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$"), "transformer.")
HF_LLAMA = Family(LLAMA, _as_stored, re.compile(r"\.rotary_emb\.inv_freq$"), "model.")
GGUF_LLAMA = Family(GGUF, _from_interleaved, head="output.weight")
GGUF_QWEN3 = Family(GGUF, _as_stored, head="output.weight")


def family_of(config: ModelConfig) -> Family:
    """Of Hugging Face checkpoints."""
    return HF_GPT2 if config.positions == "learned" else HF_LLAMA


def their_name(ours: str, family: Family) -> str:
    """Their name of a parameter. Raises ValueError where the family has no such part."""
    layer = re.search(r"\.(\d+)\.", ours)
    pattern = ours if layer is None else ours.replace(f".{layer[1]}.", ".{i}.", 1)
    stem, _, last = pattern.rpartition(".")
    theirs = family.names.get(pattern) or family.names.get(f"{stem}.{{p}}")
    if theirs is None:
        raise ValueError(f"no name for {ours} in this family: it has no such part")
    return theirs.replace("{i}", layer[1] if layer else "").replace("{p}", last)


def matched(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, str]:
    """Our name of every parameter -> the tensor of theirs that it comes from.

    Args:
        shapes: of all their tensors, by name.
    Raises:
        ValueError: names every tensor which is missing, left over, or has another shape than the config says.
    """
    if config.layers > len(shapes):  # said before a model of a million layers is built
        raise ValueError(f"the config says {config.layers} layers, and there are {len(shapes)} tensors")
    try:
        with without_storage():
            wanted = {name: tuple(p.shape) for name, p in Transformer(config).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"no model has the size that the config says: {str(error).splitlines()[0]}") from None
    found, missing, wrong = {}, [], []
    for name, shape in wanted.items():
        if name == "head.weight" and config.tied:
            continue
        source = their_name(name, family)
        bare = source.removeprefix(family.prefix)
        source = source if source in shapes or bare not in shapes else bare
        if source not in shapes:
            missing.append(f"{source} (our {name})")
            continue
        found[name] = source
        if (made := _made_shape(name, shapes[source], family, config)) != shape:
            wrong.append(f"{source} gives {name} the shape {made}, the config says {shape}")
    used = set(found.values()) | ({family.head} if config.tied else set())
    left = sorted(name for name in shapes if name not in used and not family.buffers.search(name))
    if missing or left:
        raise ValueError(
            f"tensors do not fit the config: missing {_a_few(missing)}, left over {_a_few(left)}"
        )  # gallery: baselines/not-strict
    if wrong:
        raise ValueError(_a_few(wrong))
    return found


def _made_shape(name: str, shape: tuple[int, ...], family: Family, config: ModelConfig) -> tuple[int, ...] | None:
    try:
        return tuple(family.shaped(name, torch.empty(shape, device="meta"), config).shape)
    except (RuntimeError, ValueError, IndexError):  # a shape that cannot be split
        return None


def _a_few(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def renamed(
    theirs: Mapping[str, Tensor], names: Mapping[str, str], family: Family, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """(our name, our tensor), one at a time: `theirs` may read each when it is asked for."""
    for ours, source in names.items():
        yield ours, family.shaped(ours, theirs[source], config)


def tensors_from_hf(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors (weights or gradients) under our names and in our shapes.

    Raises ValueError that names every tensor which is missing or left over.
    """
    family = family_of(config)
    names = matched(config, {name: tuple(tensor.shape) for name, tensor in theirs.items()}, family)
    return dict(renamed(theirs, names, family, config))


def tensors_to_hf(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The way back: our parameters as a Hugging Face checkpoint has them."""
    family, found = family_of(config), {}
    for name, tensor in ours.items():
        if name == "head.weight" and config.tied:
            continue
        if config.rope_layout == "interleaved" and config.positions == "rope":
            tensor = _from_interleaved(name, tensor, config)
            if name.endswith(("query_norm.weight", "key_norm.weight")):
                tensor = to_half_layout(tensor)
        if family is HF_GPT2 and name.endswith(".weight") and (".attention." in name or ".mlp." in name):
            tensor = tensor.T
        found.setdefault(their_name(name, family), []).append(tensor)  # query, key, value and gate, up: in our order
    last = family is HF_GPT2
    return {name: (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1 if last else 1)).contiguous()
            for name, parts in found.items()}  # fmt: skip


def from_transformers(module: torch.nn.Module) -> Transformer:
    """A copy of a transformers model (GPT-2, Llama, Qwen3, Mistral, Mixtral) as ours: same format, device and mode.

    Its dropout is zero whatever their config says.
    """
    config = config_from_hf(module.config.to_dict())
    made = Transformer(config).to(module.dtype)
    found = tensors_from_hf(module.state_dict(), config)
    if config.tied:
        found["head.weight"] = found["embedding.weight"]
    made.load_state_dict(found)
    return made.to(next(module.parameters()).device).train(module.training)
