"""Run it again: which numbers of a finished run agree, and to which digit."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.foundation.code import code_hashes
from common.foundation.files import read_json
from common.foundation.months import ROOT
from common.foundation.run import ensure, status

# Numbers that agree to this many significant digits are the same result: threads and processors round differently.
DIGITS = 6


@dataclass(frozen=True)
class Outcome:
    """For each number of the summary, the number of significant digits that agree (16 is bit for bit)."""

    run: str
    digits: dict[str, int]
    changed_code: list[str]

    @property
    def agrees(self) -> bool:
        return bool(self.digits) and all(count >= DIGITS for count in self.digits.values())

    def as_dict(self) -> dict[str, Any]:
        return {"run": self.run, "agrees": self.agrees, "digits": self.digits, "changed_code": self.changed_code}

    def __str__(self) -> str:
        exact = sum(count == 16 for count in self.digits.values())
        lines = [f"{len(self.digits)} numbers: {exact} agree exactly"]
        lines += [f"  {path}: {count} digits" for path, count in self.digits.items() if count < 16]
        if self.changed_code:
            lines.append(f"the code has changed since, in: {', '.join(self.changed_code)}")
        lines.append("reproduced" if self.agrees else f"NOT reproduced: some numbers differ within {DIGITS} digits")
        return "\n".join(lines)


def reproduce(directory: Path, scratch: Path) -> Outcome:
    """Run the config of a finished run again under `scratch` and compare the summaries number by number.

    Raises ValueError if `directory` is not a finished run.
    """
    state = status(directory)
    if state != "finished":
        raise ValueError(f"{directory} is {state}, not finished: there is nothing to reproduce")
    manifest = read_json(directory / "manifest.json")
    now = code_hashes(ROOT / manifest["month"] / "run.py")
    changed = sorted(name for name in {*now, *manifest["code"]} if now.get(name) != manifest["code"].get(name))
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in manifest["config"].items()}
    before = os.environ.get("SPINE_RUNS")
    os.environ["SPINE_RUNS"] = str(scratch)
    try:
        again = ensure(manifest["month"], fields.pop("size"), **fields)
    finally:
        os.environ.pop("SPINE_RUNS")
        if before is not None:
            os.environ["SPINE_RUNS"] = before
    first, second = numbers_in(read_json(directory / "summary.json")), numbers_in(read_json(again / "summary.json"))
    digits = {path: agreeing_digits(first.get(path), second.get(path)) for path in {**first, **second}}
    return Outcome(str(directory), digits, changed)


def numbers_in(value: Any, path: str = "") -> dict[str, float]:
    """Every number in a JSON value by its path, without those that were read off a clock.

    >>> numbers_in({"a": [1, {"b": 2.5}], "c": "text"})
    {'a.0': 1, 'a.1.b': 2.5}
    """
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {}
    if isinstance(value, dict) and value.get("clock"):
        return {}
    if isinstance(value, int | float):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for key, item in items:
        found.update(numbers_in(item, f"{path}.{key}" if path else str(key)))
    return found


def agreeing_digits(a: float | None, b: float | None) -> int:
    """Significant digits in which two numbers agree, 0 to 16.

    >>> agreeing_digits(2.2606, 2.2607), agreeing_digits(0.1, 0.1), agreeing_digits(1.0, None)
    (4, 16, 0)
    """
    if a is None or b is None:
        return 0
    if a == b:
        return 16
    return next((count for count in range(15, 0, -1) if f"{a:.{count - 1}e}" == f"{b:.{count - 1}e}"), 0)
