"""Did this change improve the model, or just change the measurement?

Two runs are compared by what their manifests say they are. Only where the measurement is the same does a difference of
numbers say something about the system that was measured; and only where nothing else is recorded as different either.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.foundation.files import read_json
from common.foundation.run import status

# Code that decides how a number is taken: a change there is a change of the measurement, whatever the config says.
MEASURING = ("common.evaluation", "common.training.loss", "common.foundation.statistics")
# Code that is part of what is measured. What trains a model is not listed: its changes show in the model's hash.
MEASURED = ("common.model", "common.tokenization", "common.generation", "common.reasoning")


@dataclass(frozen=True)
class Comparison:
    """Paths that differ, as {"path": (in a, in b)}, on three sides.

    `model` is the system under test: weights, tokenizer, strategy and their code. `measurement` is test data, units, rules
    and the code that measures. `other` is everything else on record that could have moved a number.
    """

    model: dict[str, tuple[Any, Any]]
    measurement: dict[str, tuple[Any, Any]]
    other: dict[str, tuple[Any, Any]]

    @property
    def verdict(self) -> str:
        """One of "same", "model", "measurement", "both", "unclear"."""
        if self.model and self.measurement:
            return "both"
        if self.model or self.measurement:
            return "model" if self.model else "measurement"
        return "unclear" if self.other else "same"

    def __str__(self) -> str:
        sentences = {
            "same": "same model, same measurement: the numbers must agree",
            "model": "the system under test changed and the measurement did not: the numbers can be compared",
            "measurement": "only the measurement changed: the difference says nothing about the model",
            "both": "model and measurement changed: the difference cannot be attributed; change one at a time",
            "unclear": "model and measurement are on record as the same, but other things differ: a number that moved "
            "was moved by one of them",
        }
        lines = [sentences[self.verdict]]
        for side, changes in (("model", self.model), ("measurement", self.measurement), ("other", self.other)):
            lines += [f"  {side}: {path}: {_short(a)} -> {_short(b)}" for path, (a, b) in changes.items()]
        return "\n".join(lines)


def compare(run_a: str | Path, run_b: str | Path) -> Comparison:
    """Compare two run directories by their manifests. Raises ValueError unless both are finished runs."""
    manifests = []
    for run in map(Path, (run_a, run_b)):
        state = status(run)
        if state != "finished":
            raise ValueError(f"{run} is not a finished run ({state}): give the folder that holds its manifest.json")
        manifests.append(read_json(run / "manifest.json"))
    return compare_manifests(*manifests)


def compare_manifests(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    """Compare two manifests. The tokenizer belongs to the model."""
    if a["month"] != b["month"]:
        raise ValueError(f"runs of different months cannot be compared: {a['month']} and {b['month']}")
    return Comparison(*(differences(left, right) for left, right in zip(_sides(a), _sides(b), strict=True)))


def _sides(manifest: dict[str, Any]) -> tuple[dict, dict, dict]:
    measured = {name: digest for name, digest in manifest["code"].items() if name.startswith(MEASURED)}
    measuring = {name: digest for name, digest in manifest["code"].items() if name.startswith(MEASURING)}
    rest = {name: digest for name, digest in manifest["code"].items() if name not in {**measured, **measuring}}
    return (
        {**manifest["identity"]["model"], "tokenizer": manifest["tokenizer"], "code": measured},
        {**manifest["identity"]["measurement"], "code": measuring},
        {"code": rest, "inputs": manifest["inputs"], "packages": manifest["packages"]},
    )


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
