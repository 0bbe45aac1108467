"""The training that all small experiments share: fp32, a short warm-up, a plateau, and a fall to zero."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from common.data.stream import Stream
from common.training.optimizers import make_optimizers
from common.training.schedules import Schedule
from common.training.trainer import Trainer


def quick_training(
    model: nn.Module,
    stream: Stream,
    steps: int,
    *,
    optimizer: str = "muon",
    learning_rate: float = 4e-3,
    weight_decay: float = 0.1,
    schedule: Callable[[int], float] | None = None,
    **more: Any,
) -> Trainer:
    """A trainer that is ready to train; `more` is passed on to it (objective, settings, evaluate, label)."""
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay, "muon_dtype": torch.float32}
    schedule = schedule or Schedule(steps, max(1, steps // 20), "wsd", floor=0.0)
    return Trainer(model, stream, make_optimizers(model, optimizer, **rates), schedule, **more)
