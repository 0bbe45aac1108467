"""The one loss of the year: negative log-likelihood of the targets that count.

It returns the sum and the count beside the mean, because means of unequal batches must never be averaged again
(gallery: spine/mean-of-means).
"""

import math
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Loss(NamedTuple):
    """In nats. `mean` is `sum / count`, and zero where nothing counts."""

    sum: Float[Tensor, ""]
    count: Int[Tensor, ""]
    mean: Float[Tensor, ""]


def token_nats(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-ln P(target) at each position, computed in fp32 or better."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} disagree: "
            "need (B, T, V) and (B, T), with targets[b, t] the token after inputs[b, t]"
        )
    precise = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(precise.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def language_model_loss(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"] | None = None
) -> Loss:
    """Sum, count and mean of the loss over the targets that `loss_mask` admits (all of them without one)."""
    nats = token_nats(logits, targets)
    if loss_mask is None:
        loss_mask = targets.new_ones(targets.shape, dtype=bool)
    total, count = (nats * loss_mask).sum(), loss_mask.sum()
    return Loss(total, count, total / count.clamp(min=1))


def bits(nats: float) -> float:
    """One bit is ln 2 nats: `bits(0.6931…) == 1`."""
    return nats / math.log(2)
