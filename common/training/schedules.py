"""Learning rates over a training as a function of the step alone, and the test that finds the highest usable rate.

A schedule is a factor of the top rate for each update, from the first (step 0) to the last (steps - 1). The first factor is
above zero: a warm-up that starts at 0 wastes its first batch (gallery: pretraining/zero-warmup).
"""

import math
from dataclasses import dataclass
from typing import Literal


def cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """A linear rise over `warmup` updates, then half a cosine from 1 down to `floor`.

    >>> [round(cosine(step, 10, 2), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.55, 0.13]
    """
    warmup = max(1, warmup)
    rise, fall = min(1.0, (step + 1) / warmup), min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    half = (1 - floor) / 2
    return rise * (floor + half + half * math.cos(math.pi * fall))


def warmup_stable_decay(step: int, steps: int, warmup: int, floor: float = 0.0, decay: float = 0.3) -> float:
    """A linear rise, a plateau, and a linear fall over the last `decay` of all steps (Hu et al. 2024, "MiniCPM").

    The plateau does not depend on `steps`, so a training can be prolonged from any point of it.

    >>> [round(warmup_stable_decay(step, 10, 2), 2) for step in (0, 1, 6, 7, 9)]
    [0.5, 1.0, 1.0, 0.75, 0.25]
    """
    begin = steps - max(1, round(decay * steps))
    rise = min(1.0, (step + 1) / max(1, warmup))
    if step < begin:
        return rise
    left = max(0.0, (steps - step) / (steps - begin + 1))  # beyond the end it must not turn negative
    return min(rise, floor + (1 - floor) * left)


@dataclass(frozen=True)
class Schedule:
    """A shape and its numbers. `schedule(step)` is the factor of update `step`; updates are counted, not micro-batches.

    Attributes:
        steps: the number of updates in all.
        warmup: the number of updates over which the rate rises.
        floor: the factor at the end.
    """

    steps: int
    warmup: int = 0
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "wsd", "constant"):
            raise ValueError(f"schedule {self.kind!r} is unknown; there are cosine, wsd, constant")

    def __call__(self, step: int) -> float:
        if self.kind == "cosine":
            return cosine(step, self.steps, self.warmup, self.floor)
        if self.kind == "wsd":
            return warmup_stable_decay(step, self.steps, self.warmup, self.floor)
        return min(1.0, (step + 1) / max(1, self.warmup))


@dataclass(frozen=True)
class RateRange:
    """Raise the rate from `lowest` to 1 by a constant factor a step; where the loss turns up, it is too high (Smith 2015).

    >>> [round(RateRange(0.01, 3)(step), 3) for step in range(3)]
    [0.01, 0.1, 1.0]
    """

    lowest: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.lowest ** (1 - step / max(1, self.steps - 1))
