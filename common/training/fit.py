"""The smallest training loop: torch's AdamW, a warm-up and a cosine, written out.

The experiments of March and April use it; they came before the Trainer. Their numbers belong to this loop to the last bit:
it takes torch's optimizer and clipping, decays every parameter alike, computes the loss from whole logits, and leaves
torch's generator alone. Later months use the Trainer (quick.py), which also saves, resumes, accumulates and evaluates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from common.data.documents import Batch
from common.training.loss import language_model_loss
from common.training.objectives import several_documents
from common.training.schedules import cosine


@dataclass
class Fit:
    """What happened: `losses` in nats at every step, and the step at which the loss was no longer finite, or None."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    diverged_at: int | None = None
    tokens: int = 0


def fit(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    steps: int,
    *,
    learning_rate: float = 3e-3,
    warmup: int | None = None,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    label: str = "",
    watch: Callable[[int], None] | None = None,
) -> Fit:
    """Train a model in place.

    Args:
        batch_at: returns the batch of a step; a function of the step alone, so that trainings can be compared by batch.
        learning_rate: the rate at the top of the schedule, which ends at a tenth of it.
        warmup: the number of steps of linear rise; by default a tenth of all.
        clip: the largest gradient norm; None never clips.
        watch: called with the number of steps done, before the first step and after each.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    warmup, found = steps // 10 if warmup is None else warmup, Fit()
    model.train()
    if watch:
        watch(0)
    for step in tqdm(range(steps), desc=label or "training", leave=False, delay=5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine(step, steps, warmup)
        batch = batch_at(step)
        out = model(batch.inputs, document_ids=several_documents(batch.document_ids))
        loss = language_model_loss(out.logits, batch.targets, batch.loss_mask).mean
        penalty = (out.aux or {}).get("penalty", 0.0)
        (loss + penalty).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
        found.losses.append(float(loss.detach()))
        found.gradient_norms.append(float(norm))
        found.tokens += batch.inputs.numel()
        if not math.isfinite(found.losses[-1]) or not math.isfinite(found.gradient_norms[-1]):
            found.diverged_at = step
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if watch:
            watch(step + 1)
    model.eval()
    return found
