"""Did this change improve the model, or just change the measurement?

Two runs are compared by what their manifests say they are: which model, which measurement. Only where the measurement
is the same does a difference of numbers say something about the models.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.foundation.files import read_json

# Code that decides how a number is taken. A change there is a change of the measurement, whatever the config says.
MEASURING_ROOMS = ("evaluation",)


@dataclass(frozen=True)
class Comparison:
    """Paths that differ, as {"path": (in a, in b)}, and the sentence that follows from them."""

    model: dict[str, tuple[Any, Any]]
    measurement: dict[str, tuple[Any, Any]]

    @property
    def verdict(self) -> str:
        """One of "same", "model", "measurement", "both": what changed."""
        if self.model and self.measurement:
            return "both"
        return "model" if self.model else "measurement" if self.measurement else "same"

    def __str__(self) -> str:
        sentences = {
            "same": "same model, same measurement: the numbers must agree",
            "model": "the model changed and the measurement did not: the numbers can be compared",
            "measurement": "only the measurement changed: the difference says nothing about the model",
            "both": "model and measurement changed: the difference cannot be attributed; change one at a time",
        }
        lines = [sentences[self.verdict]]
        for side, changes in (("model", self.model), ("measurement", self.measurement)):
            lines += [f"  {side}.{path}: {_short(a)} -> {_short(b)}" for path, (a, b) in changes.items()]
        return "\n".join(lines)


def compare(run_a: str | Path, run_b: str | Path) -> Comparison:
    """Compare two run directories by their manifests."""
    return compare_manifests(*(read_json(Path(run) / "manifest.json") for run in (run_a, run_b)))


def compare_manifests(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    """Compare two manifests. The tokenizer belongs to the model, the code of the measuring rooms to the measurement.

    Code of other rooms is not listed: what it changed shows in the hash of the model that it made.
    """
    if a["month"] != b["month"]:
        raise ValueError(f"runs of different months cannot be compared: {a['month']} and {b['month']}")
    sides = []
    for manifest in (a, b):
        code = {room: digest for room, digest in manifest["code"].items() if room in MEASURING_ROOMS}
        model = {**manifest["identity"]["model"], "tokenizer": manifest["tokenizer"]}
        sides.append((model, {**manifest["identity"]["measurement"], "code": code}))
    (model_a, measure_a), (model_b, measure_b) = sides
    return Comparison(differences(model_a, model_b), differences(measure_a, measure_b))


def differences(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """The leaves in which two JSON values differ.

    >>> differences({"rule": "whole", "n": 5}, {"rule": "last_digit", "n": 5})
    {'rule': ('whole', 'last_digit')}
    """
    if isinstance(a, dict) and isinstance(b, dict):
        found = {}
        for key in [*a, *(key for key in b if key not in a)]:
            found.update(differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key)))
        return found
    return {} if a == b else {path: (a, b)}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
