"""The probes, pointed at somebody's model: `doctor(model, vocab_size)` or `python -m common doctor --hf FOLDER`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from common.diagnostics.core import Probe, Reading
from common.diagnostics.handles import handles_of
from common.diagnostics.probes import ALL


@dataclass(frozen=True)
class Examination:
    """What the probes said. `skipped` are the probes for which a handle was missing, with the handles they need."""

    readings: dict[str, Reading]
    skipped: dict[str, tuple[str, ...]]
    random_ids: bool = False

    @property
    def healthy(self) -> bool:
        return not any(reading.caught for reading in self.readings.values())

    def __str__(self) -> str:
        lines = [
            f"{'ALARM' if r.caught else 'ok':<6} {name:<20} {r.value:.3g} (at most {r.threshold:.3g}) {r.note}"
            for name, r in self.readings.items()
        ]
        missing = sorted({handle for needs in self.skipped.values() for handle in needs})
        if self.random_ids:
            lines.append(
                "inputs were random ids, which a model may ignore; give ids=… with text it knows for a harder look"
            )
        if self.skipped:
            lines.append(f"not run: {', '.join(self.skipped)}; they also need {', '.join(missing)}")
        return "\n".join(lines)


def doctor(
    model: Callable[..., Any] | None = None,
    vocab_size: int | None = None,
    *,
    probes: Sequence[Probe] = ALL,
    **handles: Any,
) -> Examination:
    """Run every probe for which the handles are there.

    Args:
        model: ids (B, T) int64 -> logits (B, T, V), bare or in an object with `.logits` (any Hugging Face model). From an
            `nn.Module`, handles for padding, packing, caches and gradients are made as well, where it has them.
        vocab_size: V.
        handles: more of what `common.diagnostics.core.HANDLES` lists: generate=…, bits_per_byte=…, accuracy=….

    >>> import torch
    >>> peeking = lambda ids: torch.nn.functional.one_hot(ids.roll(-1, dims=1), 50).double()
    >>> doctor(peeking, 50).readings["future-perturbation"].caught
    True
    """
    made = handles_of(model) if isinstance(model, nn.Module) else {}
    given = {**made, "model": model, **({} if vocab_size is None else {"vocab_size": vocab_size}), **handles}
    specimen = {name: value for name, value in given.items() if value is not None}
    readings, skipped = {}, {}
    for probe in probes:
        if probe.applies_to(specimen):
            readings[probe.name] = probe.examine(specimen)[0]
        else:
            skipped[probe.name] = tuple(name for name in probe.needs if name not in specimen)
    return Examination(readings, skipped, "model" in specimen and "ids" not in specimen)
