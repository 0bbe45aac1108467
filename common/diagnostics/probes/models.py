"""Probes of a language model: any callable from ids (B, T) to logits (B, T, V)."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.diagnostics.core import Reading, probe


def logits_of(model: Callable[[Tensor], object], ids: Tensor) -> Tensor:
    """Accepts a bare tensor, or an output object with `.logits` (ours, and Hugging Face's)."""
    with torch.no_grad():
        return bare(model(ids)).double()


def bare(out: object) -> Tensor:
    """The logits in what a model returned."""
    return out if isinstance(out, Tensor) else out.logits


def inputs(ids: Tensor | None, vocab_size: int, rows: int = 4, length: int = 16) -> tuple[Tensor, Tensor]:
    """Two different batches of the same shape: the given ids and the same read backwards, or random ones.

    Raises ValueError where nothing could be seen: a single row or column, or rows that read the same backwards.
    """
    if ids is None:
        generator = torch.Generator().manual_seed(0)
        batch, other = torch.randint(vocab_size, (2, rows, length), generator=generator)
    else:
        batch, other = ids[:rows, :length], ids[:rows, :length].flip(1)
    if batch.ndim != 2 or min(batch.shape) < 2 or not (batch != other).any(dim=1).all():
        raise ValueError("ids must have at least two rows and two columns, and no row may read the same backwards")
    return batch, other


def change(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, zero where both are the same infinity, and NaN wherever NaN is involved."""
    return torch.where(a == b, 0.0, (a - b).abs())


@probe("repeatable", "does the same input give the same logits twice?")
def repeatable(model: Callable, vocab_size: int, ids: Tensor | None = None, *, tolerance: float = 1e-6) -> Reading:
    """Largest difference between two passes on the same ids. Dropout left on shows here."""
    batch, _ = inputs(ids, vocab_size)
    first, second = logits_of(model, batch), logits_of(model, batch)
    return Reading(float(change(first, second).max()), tolerance, "largest change of a logit")


@probe("future-perturbation", "does a position see what comes after it?")
def future_perturbation(
    model: Callable, vocab_size: int, ids: Tensor | None = None, *, tolerance: float = 1e-4
) -> Reading:
    """Change every token after position t, for each t: no logit up to t may move."""
    batch, other = inputs(ids, vocab_size)
    before = logits_of(model, batch)
    moved = []
    for t in range(batch.shape[1] - 1):
        changed = torch.cat([batch[:, : t + 1], other[:, t + 1 :]], dim=1)
        moved.append(change(logits_of(model, changed)[:, : t + 1], before[:, : t + 1]).max())
    return Reading(
        float(torch.stack(moved).max()), tolerance, "largest change of a logit at or before the changed place"
    )


@probe("cross-row", "does a row see another row of its batch?")
def cross_row(model: Callable, vocab_size: int, ids: Tensor | None = None, *, tolerance: float = 1e-4) -> Reading:
    """Change one row at a time: the logits of the others must stay."""
    batch, other = inputs(ids, vocab_size)
    before = logits_of(model, batch)
    moved = []
    for row in range(len(batch)):
        changed = batch.clone()
        changed[row] = other[row]
        others = torch.arange(len(batch)) != row
        moved.append(change(logits_of(model, changed), before)[others].max())
    return Reading(float(torch.stack(moved).max()), tolerance, "largest change of a logit in an unchanged row")
