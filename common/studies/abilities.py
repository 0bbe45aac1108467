"""What an objective teaches and what it does not: three trainings on the same characters, three questions to each.

    continue     the next character, from what is to its left
    fill in      a character, from both sides
    fill in by trying    the same asked of a model that only knows what comes next: write each candidate, score the whole

All in nats per character on held-out windows; what a model cannot be asked is None.
"""

from dataclasses import dataclass

import numpy as np
import torch

from common.data.stream import RandomWindows
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.studies.classic import CONTEXT, Characters
from common.training.loss import token_nats
from common.training.objectives import Masked, NextToken, Prefix
from common.training.quick import quick_training

OBJECTIVES = ("next token", "prefix", "masked")
WINDOW, HOLE = 48, 24  # characters of a window, and the place that is left out


@dataclass(frozen=True)
class Abilities:
    """Nats per character over the same windows; `targets` is how many characters taught something in training."""

    continue_text: list[float]
    fill_in: list[float]
    fill_in_by_trying: list[float] | None
    targets: int


def train_and_ask(objective: str, text: Characters, steps: int, *, seed: int, windows: int = 256) -> Abilities:
    """Train one model with this objective and ask it everything."""
    vocabulary = len(text.alphabet)
    mask_id = vocabulary  # one more token, that no text contains
    made = {"next token": NextToken(), "prefix": Prefix(seed), "masked": Masked(mask_id, vocabulary, seed=seed)}
    config = ModelConfig(vocab_size=vocabulary + 1, context_length=CONTEXT, layers=3, width=64, heads=4, init="fan_in")
    model = Transformer(config, seed=seed)
    stream = RandomWindows(text.train, length=WINDOW, batch_size=24, seed=seed)
    trainer = quick_training(model, stream, steps, objective=made[objective]).train()
    rng = np.random.default_rng(0)  # the same windows for every training
    places = rng.integers(0, len(text.held_out) - WINDOW, windows)
    asked = torch.from_numpy(np.stack([text.held_out[p : p + WINDOW] for p in places]))
    targets = int(sum(row["targets"] for row in trainer.history))
    by_trying = None if objective == "masked" else filled_by_trying(model, asked, objective, vocabulary)
    return Abilities(
        continued(model, asked, objective, mask_id), filled(model, asked, objective, mask_id), by_trying, targets
    )


@torch.no_grad()
def continued(model: Transformer, windows: torch.Tensor, objective: str, mask_id: int) -> list[float]:
    """-ln P(character at HOLE | everything to its left). A masked model gets a mask there and nothing after it."""
    left = windows[:, :HOLE]
    if objective == "masked":
        left = torch.cat([left, torch.full((len(left), 1), mask_id)], dim=1)
    whole = torch.full((len(left),), left.shape[1])
    logits = model(left, prefix=None if objective == "next token" else whole).logits[:, -1:]
    return token_nats(logits[..., :mask_id], windows[:, HOLE : HOLE + 1]).squeeze(1).tolist()


@torch.no_grad()
def filled(model: Transformer, windows: torch.Tensor, objective: str, mask_id: int) -> list[float]:
    """-ln P(character at HOLE | both sides) in one pass; a model without masks can use the left side only."""
    if objective != "masked":
        return continued(model, windows, objective, mask_id)
    inputs = windows.clone()
    inputs[:, HOLE] = mask_id
    logits = model(inputs, prefix=torch.full((len(inputs),), WINDOW)).logits[:, HOLE : HOLE + 1]
    return token_nats(logits[..., :mask_id], windows[:, HOLE : HOLE + 1]).squeeze(1).tolist()


@torch.no_grad()
def filled_by_trying(model: Transformer, windows: torch.Tensor, objective: str, vocabulary: int) -> list[float]:
    """P(c | left, right) is proportional to P(left, c, right): every candidate is written and scored, V passes for one."""
    found = []
    for window in windows:
        rows = window.repeat(vocabulary, 1)
        rows[:, HOLE] = torch.arange(vocabulary)
        prefix = None if objective == "next token" else torch.full((vocabulary,), HOLE)
        logits = model(rows[:, :-1], prefix=prefix).logits[:, HOLE - 1 :, :vocabulary]  # from the candidate on
        total = token_nats(logits, rows[:, HOLE:]).sum(dim=1)
        found.append(float(total[window[HOLE]] + torch.logsumexp(-total, dim=0)))
    return found
