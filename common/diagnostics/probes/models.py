"""Probes of a language model: any callable from ids (B, T) to logits (B, T, V)."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.diagnostics.core import Reading, probe


def _logits(model: Callable[[Tensor], object], ids: Tensor) -> Tensor:
    """Accepts a bare tensor, or an output object with `.logits` (ours, and Hugging Face's)."""
    with torch.no_grad():
        out = model(ids)
    return (out if isinstance(out, Tensor) else out.logits).double()


def _inputs(ids: Tensor | None, vocab_size: int, rows: int = 4, length: int = 16) -> tuple[Tensor, Tensor]:
    """Two different batches of the same shape: the given ids and the same read backwards, or random ones."""
    if ids is not None:
        return ids[:rows, :length], ids[:rows, :length].flip(1)
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(vocab_size, (2, rows, length), generator=generator)
    return both[0], both[1]


@probe("repeatable", "does the same input give the same logits twice?")
def repeatable(model: Callable, vocab_size: int, ids: Tensor | None = None, *, tolerance: float = 1e-6) -> Reading:
    """Largest difference between two passes on the same ids. Dropout left on shows here."""
    batch, _ = _inputs(ids, vocab_size)
    first, second = _logits(model, batch), _logits(model, batch)
    return Reading(float((first - second).abs().max()), tolerance, "largest change of a logit")


@probe("future-perturbation", "does a position see what comes after it?")
def future_perturbation(
    model: Callable, vocab_size: int, ids: Tensor | None = None, *, tolerance: float = 1e-4
) -> Reading:
    """Change every token after position t, for each t: no logit up to t may move."""
    batch, other = _inputs(ids, vocab_size)
    before = _logits(model, batch)
    worst = 0.0
    for t in range(batch.shape[1] - 1):
        changed = torch.cat([batch[:, : t + 1], other[:, t + 1 :]], dim=1)
        worst = max(worst, float((_logits(model, changed)[:, : t + 1] - before[:, : t + 1]).abs().max()))
    return Reading(worst, tolerance, "largest change of a logit at or before the changed place")


@probe("cross-row", "does a row see another row of its batch?")
def cross_row(model: Callable, vocab_size: int, ids: Tensor | None = None, *, tolerance: float = 1e-4) -> Reading:
    """Change one row at a time: the logits of the others must stay."""
    batch, other = _inputs(ids, vocab_size)
    before = _logits(model, batch)
    worst = 0.0
    for row in range(len(batch)):
        changed = batch.clone()
        changed[row] = other[row]
        moved = (_logits(model, changed) - before).abs().amax(dim=(1, 2))
        moved[row] = 0
        worst = max(worst, float(moved.max()))
    return Reading(worst, tolerance, "largest change of a logit in an unchanged row")
