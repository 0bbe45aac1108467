"""What heads do: scores of their attention maps, and their removal.

Maps are weights (B, H, T, S), as `model(ids, want=["attention"]).aux["attention"]` gives them for each layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.model.transformer import Transformer


def previous_token_score(weights: Float[Tensor, "B H T T"]) -> Float[Tensor, "H"]:
    """Attention on the token before, averaged over queries: 1 for a head that only does that."""
    return weights.diagonal(offset=-1, dim1=2, dim2=3).mean(dim=(0, 2))


def induction_score(weights: Float[Tensor, "B H T T"], ids: Int[Tensor, "B T"]) -> Float[Tensor, "H"]:
    """Attention on the tokens that followed an earlier occurrence of the present one (Olsson et al. 2022).

    Averaged over the queries whose token has occurred before: 1 for a head that only looks where to continue.
    """
    # (B, T, S): was the token before s the one at t?
    followed = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool, device=ids.device)
    followed[:, :, 1:] = ids[:, :, None] == ids[:, None, :-1]
    followed &= torch.ones_like(followed[0]).tril()
    asked = followed.any(dim=-1)  # (B, T)
    if not asked.any():
        raise ValueError("no token occurs twice: there is nothing to look up, so no induction to score")
    mass = (weights * followed[:, None]).sum(dim=-1)  # (B, H, T)
    return mass.transpose(0, 1)[:, asked].mean(dim=1)


@contextmanager
def without_heads(model: Transformer, heads: Sequence[tuple[int, int]]) -> Iterator[Transformer]:
    """The model with these (layer, head) contributing nothing: their part of the mix is zero before the output matrix."""
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
