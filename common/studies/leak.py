"""Learning by heart, and being asked what one has read: the same training with and without the test text in its data."""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from common.data.stream import RandomWindows
from common.model.transformer import Transformer
from common.studies.classic import CONTEXT, Characters, held_out_nats
from common.studies.scaling import shape
from common.training.optimizers import make_optimizers
from common.training.schedules import RateRange, Schedule
from common.training.trainer import Settings, Trainer, TrainingDiverged

PIECE = 20_000  # characters of each text that is scored, if there are so many


@dataclass(frozen=True)
class Watched:
    """Nats per character over a training, of three texts that are always the same.

    Attributes:
        updates: when.
        trained: the beginning of the training text.
        tested: a text that is in the training data only where it leaked.
        fresh: a text that is never in it.
    """

    updates: list[int]
    trained: list[float]
    tested: list[float]
    fresh: list[float]


def watch(text: Characters, characters: int, steps: int, *, leaked: bool, width: int = 64, seed: int = 0) -> Watched:
    """Train on `characters` of text, with the tested text appended where it is `leaked`."""
    piece = min(PIECE, len(text.held_out) // 2)
    tested, fresh = text.held_out[:piece], text.held_out[piece : 2 * piece]
    own = text.train[:characters]
    train = np.concatenate([own, tested]) if leaked else own
    found = Watched([], [], [], [])

    def score(model: Transformer, done: int) -> dict[str, float]:
        found.updates.append(done)
        for values, ids in ((found.trained, own[:piece]), (found.tested, tested), (found.fresh, fresh)):
            values.append(held_out_nats(model, ids))
        return {}

    model = Transformer(shape(width, len(text.alphabet)), seed=seed)
    optimizers = make_optimizers(model, "muon", learning_rate=4e-3, muon_dtype=torch.float32)
    stream = RandomWindows(train, length=CONTEXT, batch_size=24, seed=seed)
    settings = Settings(evaluate_every=max(1, steps // 8))
    schedule = Schedule(steps, max(1, steps // 20), "wsd", floor=0.0)
    Trainer(model, stream, optimizers, schedule, settings, evaluate=score).train()
    return found


def range_test(
    optimizer: str, text: Characters, low: float, high: float, steps: int, seed: int = 0
) -> tuple[list[float], list[float]]:
    """(rates, losses) of one training in which the rate grows by a constant factor a step, until it breaks (Smith 2015)."""
    model = Transformer(shape(64, len(text.alphabet)), seed=seed)
    optimizers = make_optimizers(model, optimizer, learning_rate=high, muon_dtype=torch.float32)
    stream = RandomWindows(text.train, length=CONTEXT, batch_size=24, seed=seed)
    trainer = Trainer(model, stream, optimizers, RateRange(low / high, steps), Settings(clip=None))
    with contextlib.suppress(TrainingDiverged):  # what it is for; the history ends before
        trainer.train()
    return [high * row["rate"] for row in trainer.history], [row["loss"] for row in trainer.history]
