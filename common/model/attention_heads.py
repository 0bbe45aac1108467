"""What single attention heads do: scores of their attention patterns, and the model with some heads removed.

Patterns are attention weights (B, H, T, S), one tensor for each layer: `model(ids, want=["attention"]).aux["attention"]`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.model.transformer import Transformer


def previous_token_score(weights: Float[Tensor, "B H T T"]) -> Float[Tensor, "H"]:
    """Weight on the token before, averaged over rows and queries, (H,): 1 for a head that looks nowhere else."""
    return weights.diagonal(offset=-1, dim1=2, dim2=3).mean(dim=(0, 2))


def induction_score(weights: Float[Tensor, "B H T T"], ids: Int[Tensor, "B T"]) -> Float[Tensor, "H"]:
    """Weight on the tokens that followed an earlier occurrence of the query's token, (H,) (Olsson et al. 2022).

    It is averaged over the queries whose token has occurred before: 1 for a head that always looks at what came next then.
    Raises ValueError if no token occurs twice.
    """
    # (B, T, S): was the token before s the one at t?
    followed = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool, device=ids.device)
    followed[:, :, 1:] = ids[:, :, None] == ids[:, None, :-1]
    followed &= torch.ones_like(followed[0]).tril()
    repeated = followed.any(dim=-1)  # (B, T): queries whose token has occurred before
    if not repeated.any():
        raise ValueError("no token occurs twice: there is nothing to look up, so no induction to score")
    mass = (weights * followed[:, None]).sum(dim=-1)  # (B, H, T)
    return mass.transpose(0, 1)[:, repeated].mean(dim=1)


@contextmanager
def without_heads(model: Transformer, heads: Sequence[tuple[int, int]]) -> Iterator[Transformer]:
    """Within the context, these (layer, head) pairs contribute nothing: their part of the `output` matrix's input is zero.

    Raises ValueError for a layer or head that the model does not have.
    """
    hooks, shape = [], model.config
    for layer, head in heads:
        if not (0 <= layer < shape.layers and 0 <= head < shape.heads):
            raise ValueError(
                f"there is no head {head} in layer {layer}: {shape.layers} layers of {shape.heads} heads, from 0"
            )
    try:
        for layer, head in heads:
            output = model.blocks[layer].attention.output
            size = output.in_features // model.config.heads
            part = slice(head * size, (head + 1) * size)

            def silence(_: object, inputs: tuple[Tensor], part: slice = part) -> tuple[Tensor]:
                kept = inputs[0].clone()
                kept[..., part] = 0
                return (kept,)

            hooks.append(output.register_forward_pre_hook(silence))
        yield model
    finally:
        for hook in hooks:
            hook.remove()
