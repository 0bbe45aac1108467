"""The loss of everything that predicts tokens: the negative log-likelihood of the targets that count.

It returns the sum and the count beside the mean, because means of unequal batches must never be averaged again
(gallery: spine/mean-of-means).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from common.model.norms import autocast_dtype


class Loss(NamedTuple):
    """A loss in nats. `mean` is `sum / count`, and zero where nothing counts."""

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
    """Sum, count and mean of the loss over the targets that `loss_mask` admits, or over all if it is None."""
    nats = token_nats(logits, targets)
    if loss_mask is None:
        loss_mask = targets.new_ones(targets.shape, dtype=bool)
    total, count = (nats * loss_mask).sum(), loss_mask.sum()
    return Loss(total, count, total / count.clamp(min=1))


class _ChunkedLoss(torch.autograd.Function):
    """The sum of weighted losses. The forward pass also computes the gradients, chunk by chunk, while it has the logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int, softcap: float | None
    ) -> Tensor:
        dtype = autocast_dtype(hidden) or hidden.dtype
        matrix, total = head.to(dtype), torch.zeros((), dtype=torch.float32, device=hidden.device)
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            x = hidden[rows].to(dtype)
            z = (x @ matrix.mT).float()  # (chunk, V)
            bend = None
            if softcap:
                z = z.div_(softcap).tanh_()
                bend = 1 - z.square()
                z = z.mul_(softcap)
            z -= z.amax(dim=1, keepdim=True)
            chosen = z.gather(1, targets[rows, None])
            size = z.exp_().sum(dim=1, keepdim=True)
            total += ((size.log() - chosen).squeeze(1) * weights[rows]).sum()
            if for_hidden is None and for_head is None:
                continue
            # d loss / d z = softmax(z) - onehot(target)
            slope = (
                z.div_(size).scatter_add_(1, targets[rows, None], -torch.ones_like(chosen)).mul_(weights[rows, None])
            )
            slope = (slope if bend is None else slope * bend).to(dtype)
            if for_hidden is not None:
                for_hidden[rows] = slope @ matrix
            if for_head is not None:
                for_head += slope.mT @ x
        ctx.save_for_backward(for_hidden, for_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        for_hidden, for_head = ctx.saved_tensors
        return (
            None if for_hidden is None else for_hidden * scale,
            None if for_head is None else (for_head * scale).to(ctx.head_dtype),
            *[None] * 4,
        )


def chunked_language_model_loss(
    hidden: Float[Tensor, "B T C"],
    head: Float[Tensor, "V C"],
    targets: Int[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | None = None,
    *,
    chunk: int = 512,
    softcap: float | None = None,
) -> Loss:
    """`language_model_loss` of the logits `hidden @ head.T`, which are never held as a whole.

    On a CPU in bf16, with a vocabulary of 2,048, it is several times faster than the plain form; in fp32 with 16,384 tokens
    it is not (bench/may.py). Its memory does not grow with B * T * V. It has no gradient with respect to `loss_mask`, and no
    second derivatives.

    Args:
        hidden: the normed stream, `model(ids, head=False).hidden[-1]`.
        head: the output matrix, `model.head.weight`.
        chunk: the number of positions that are computed at a time.
        softcap: the model's `logit_softcap`.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} disagree: need (B, T, C) and (B, T)"
        )
    if loss_mask is None:
        loss_mask = targets.new_ones(targets.shape, dtype=bool)
    flat, weights = hidden.flatten(0, 1), loss_mask.flatten().float()
    total, count = _ChunkedLoss.apply(flat, head, targets.flatten(), weights, chunk, softcap), loss_mask.sum()
    return Loss(total, count, total / count.clamp(min=1))


def bits(nats: float) -> float:
    """One bit is ln 2 nats: `bits(0.6931…) == 1`."""
    return nats / math.log(2)
