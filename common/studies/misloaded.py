"""The same weights, loaded wrongly: what the loss shows, what the text looks like, and what parity says.

Each mistake is a change of a model that was loaded right, and most are one line. They are the mistakes of June's gallery, on
a model that knows something, so that one can see what each of them costs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

from common.model import transformer
from common.model.initialise import without_storage
from common.model.transformer import Transformer
from common.pretrained.names import rows_to_half, rows_to_interleaved


@dataclass(frozen=True)
class Mistake:
    """One way to load wrongly. `make` returns the wrong model; `also` is open while it runs (a replaced function)."""

    name: str
    make: Callable[[Transformer], Transformer]
    also: Callable[[], patch] | None = None


def with_config(**changes: object) -> Callable[[Transformer], Transformer]:
    def make(model: Transformer) -> Transformer:
        with without_storage():
            made = Transformer(model.config.but(**changes))
        made.load_state_dict(model.state_dict(), assign=True)  # the same tensors: nothing is copied
        return made.eval()

    return make


def with_weights(change: Callable[[Transformer], None]) -> Callable[[Transformer], Transformer]:
    def make(model: Transformer) -> Transformer:
        made = copy.deepcopy(model)
        with torch.no_grad():
            change(made)
        return made

    return make


def rows_permuted(model: Transformer) -> None:
    """As llama.cpp's file has them, not undone."""
    for block in model.blocks:
        for part, heads in ((block.attention.query, model.config.heads), (block.attention.key, model.config.groups)):
            part.weight.copy_(rows_to_interleaved(part.weight, heads))


def rows_permuted_needlessly(model: Transformer) -> None:
    for block in model.blocks:
        for part, heads in ((block.attention.query, model.config.heads), (block.attention.key, model.config.groups)):
            part.weight.copy_(rows_to_half(part.weight, heads))


def output_transposed(model: Transformer) -> None:
    for block in model.blocks:
        block.attention.output.weight.copy_(block.attention.output.weight.T.clone())


def head_random(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(0)
    std = float(model.embedding.weight.std())
    model.head.weight = nn.Parameter(std * torch.randn(model.head.weight.shape, generator=generator))


def layer_random(model: Transformer) -> None:
    fresh = Transformer(model.config.but(layers=1, vocab_size=8), seed=1)
    place = model.config.layers // 2
    model.blocks[place].load_state_dict(fresh.blocks[0].state_dict())


def gate_and_up_exchanged(model: Transformer) -> None:
    for block in model.blocks:
        block.mlp.gate, block.mlp.up = block.mlp.up, block.mlp.gate


def silu_to_gelu(model: Transformer) -> None:
    for block in model.blocks:
        block.mlp.activation = nn.functional.gelu


def rounded(model: Transformer) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def narrow_angles() -> patch:
    def angles(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        made = positions[..., None].bfloat16() * frequencies.bfloat16()
        return made.cos().float() * factor, made.sin().float() * factor

    return patch.object(transformer, "rope_angles", angles)


def mistakes(model: Transformer) -> list[Mistake]:
    """Those that this model can suffer, which has rotary positions, RMSNorm and a gated MLP."""
    return [
        Mistake("rows of Q and K as in the file", with_weights(rows_permuted)),
        Mistake("rows of Q and K permuted needlessly", with_weights(rows_permuted_needlessly)),
        Mistake("square matrices transposed", with_weights(output_transposed)),
        Mistake("head left at random", with_weights(head_random)),
        Mistake("one layer left at random", with_weights(layer_random)),
        Mistake("gate and up exchanged", with_weights(gate_and_up_exchanged)),
        Mistake("GELU for SiLU", with_weights(silu_to_gelu)),
        Mistake("another rotary base", with_config(rope_base=10_000.0 if model.config.rope_base != 1e4 else 1e5)),
        Mistake("another epsilon", with_config(norm_epsilon=1e-6 if model.config.norm_epsilon != 1e-6 else 1e-5)),
        Mistake("rotary angles in bfloat16", lambda model: with_config()(model), narrow_angles),
        Mistake("weights rounded to bfloat16", with_weights(rounded)),
    ]
