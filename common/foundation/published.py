"""What the READMEs say, as numbers: `published.json` is written together with their tables, and every later year is held
against it.

A number that is counted is the same everywhere. One that a training decided is not: another processor rounds otherwise, and
a training makes a visible difference of that. So a fresh number may lie where one more training would lie.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.foundation.files import read_json, write_json
from common.foundation.months import ROOT, month
from common.foundation.statistics import departs

PUBLISHED = ROOT / "published.json"
EXACT = 1e-4  # relative: sums of the same numbers in another order
# Where the spread over trainings was not measured: this much, or this part of the number.
ABSOLUTE, RELATIVE = 0.05, 0.2
TRAINED = 3  # from March on models are trained


@dataclass(frozen=True)
class Departure:
    """A number that is not where it was published."""

    month: str
    name: str
    fresh: float
    published: float
    why: str

    def __str__(self) -> str:
        return f"{self.month}, {self.name}: {self.fresh:.4g}, published {self.published:.4g} ({self.why})"


def mean_of(value: Mapping[str, Any] | float) -> float:
    return float(value["mean"] if isinstance(value, Mapping) else value)


def departure(
    fresh: Mapping[str, Any] | float,
    published: Mapping[str, Any] | float,
    *,
    trained: bool,
    trainings: Sequence[float] = (),
) -> str:
    """Why a fresh number is not what was published; "" where it is.

    Args:
        trained: whether a training decides it. A whole number that is no mean is a count all the same.
        trainings: the same number of several trainings, where they were measured.

    >>> departure(1.0001, 1.0, trained=False), departure(0.03, 0.9, trained=True, trainings=[0.9, 0.85, 0.95, 0.9])
    ('', 'outside what 4 trainings predict')
    """
    new, old = mean_of(fresh), mean_of(published)
    if not math.isfinite(old) or not math.isfinite(new):
        return "" if str(new) == str(old) else "not a finite number"
    apart = abs(new - old)
    if not trained or isinstance(published, int):
        return "" if apart <= EXACT * abs(old) else "a number that no training decides"
    if len(trainings) > 1:
        return f"outside what {len(trainings)} trainings predict" if departs(new, trainings) else ""
    if isinstance(published, Mapping) and published["low"] <= new <= published["high"]:
        return ""
    return "" if apart <= max(ABSOLUTE, RELATIVE * abs(old)) else "further than another processor takes it"


def departures(
    folder: str,
    summary: Mapping[str, Any],
    *,
    spreads: Mapping[str, Sequence[float]] | None = None,
    path: Path = PUBLISHED,
) -> tuple[int, list[Departure]]:
    """(numbers compared, those that are not where they were published) of a month's summary.

    Args:
        spreads: numbers over several trainings, by the name of the row.

    A row that only one of the two has is a departure as well; a clock is compared with nothing.
    """
    known = read(path).get(folder)
    if known is None:
        return 0, []
    then, now = (
        {row["name"]: row["value"] for row in rows if not row.get("clock")} for rows in (known, summary["numbers"])
    )
    found = []
    for name in [*then, *(name for name in now if name not in then)]:
        if name not in then or name not in now:
            value = mean_of(then.get(name, now.get(name)))
            found.append(Departure(folder, name, value, value, f"the row is {'new' if name in now else 'gone'}"))
            continue
        why = departure(
            now[name], then[name], trained=month(folder).number >= TRAINED, trainings=(spreads or {}).get(name, ())
        )
        if why:
            found.append(Departure(folder, name, mean_of(now[name]), mean_of(then[name]), why))
    return len(then), found


def read(path: Path = PUBLISHED) -> dict[str, list[dict[str, Any]]]:
    """Month folder -> its rows. Empty where nothing was published."""
    return read_json(path) if path.exists() else {}


def write(summaries: Mapping[str, Mapping[str, Any]], path: Path = PUBLISHED) -> None:
    """The rows of these months; those of other months stay. Values to six digits: more would differ by rounding."""
    kept = read(path)
    for folder, summary in summaries.items():
        kept[folder] = [
            {"name": row["name"], "value": _rounded(row["value"])} for row in summary["numbers"] if not row.get("clock")
        ]
    write_json(path, dict(sorted(kept.items())))


def _rounded(value: Mapping[str, Any] | float) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(part) if isinstance(part, float) else part for name, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def sentence(compared: int, found: Iterable[Departure]) -> str:
    """The last line of a year."""
    found = list(found)
    if not found:
        return f"published numbers: {compared} compared, all where they were published"
    return "\n".join(
        [f"published numbers: {compared} compared, {len(found)} elsewhere:", *(f"  {one}" for one in found)]
    )
