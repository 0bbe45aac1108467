"""Learning by heart, and being asked what one has read: the same training with and without the test text in its data."""

import contextlib
from dataclasses import dataclass

import numpy as np

from common.data.stream import RandomWindows
from common.model.transformer import Transformer
from common.studies.classic import CONTEXT, Characters, held_out_nats
from common.studies.scaling import shape
from common.training.quick import quick_training
from common.training.schedules import RateRange
from common.training.trainer import Settings, TrainingDiverged

PIECE = 20_000  # characters of each text that is scored, if there are so many


@dataclass(frozen=True)
class Watched:
    """Nats per character over a training, of three texts that are always the same.

    Attributes:
        updates: when.
        trained: the beginning of the training text.
        tested: a text that is in the training data only where it leaked.
        fresh: a text that is never in it, and does not go on where the tested one ends.
    """

    updates: list[int]
    trained: list[float]
    tested: list[float]
    fresh: list[float]


def watch(text: Characters, characters: int, steps: int, *, leaked: bool, width: int = 64, seed: int = 0) -> Watched:
    """Train on `characters` of text and one more piece: the tested text where it leaked, else as much of another play."""
    piece = min(PIECE, len(text.held_out) // 3)
    tested, fresh = text.held_out[:piece], text.held_out[-piece:]
    own, other = text.train[:characters], text.train[-piece:]
    train = np.concatenate([own, tested if leaked else other])
    found = Watched([], [], [], [])

    def score(model: Transformer, done: int) -> dict[str, float]:
        found.updates.append(done)
        for values, ids in ((found.trained, own[:piece]), (found.tested, tested), (found.fresh, fresh)):
            values.append(held_out_nats(model, ids))
        return {}

    model = Transformer(shape(width, len(text.alphabet)), seed=seed)
    stream = RandomWindows(train, length=CONTEXT, batch_size=24, seed=seed)
    quick_training(model, stream, steps, settings=Settings(evaluate_every=max(1, steps // 8)), evaluate=score).train()
    return found


def range_test(
    optimizer: str, text: Characters, low: float, high: float, steps: int, seed: int = 0
) -> tuple[list[float], list[float]]:
    """(rates, losses) of one training in which the rate grows by a constant factor a step, until it breaks (Smith 2015)."""
    model = Transformer(shape(64, len(text.alphabet)), seed=seed)
    stream = RandomWindows(text.train, length=CONTEXT, batch_size=24, seed=seed)
    rates = {"optimizer": optimizer, "learning_rate": high, "schedule": RateRange(low / high, steps)}
    trainer = quick_training(model, stream, steps, **rates, settings=Settings(clip=None))
    with contextlib.suppress(TrainingDiverged):  # what it is for; the history ends before
        trainer.train()
    return [high * row["rate"] for row in trainer.history], [row["loss"] for row in trainer.history]
