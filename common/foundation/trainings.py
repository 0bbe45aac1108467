"""Records of several trainings of one recipe, and what they say together.

An interval over questions says what another set of questions would have given the *same* model. Nothing in it says what
another seed, or another processor with its own roundings, would have given. For that one has to train again.

`05_pretraining/trainings.json` holds one record for each base training. `python -m common trainings --write` measures it,
it is committed, the article's table and figure are made from it, and every year holds its own base model against it.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.foundation.files import read_json, write_json
from common.foundation.months import ROOT
from common.foundation.statistics import departs

TRAININGS = ROOT / "05_pretraining" / "trainings.json"
Record = dict[str, Any]


def key(record: Mapping[str, Any]) -> str:
    """Which training it is: what was chosen before it began."""
    return f"{record['recipe']}, seed {record['seed']}, {record['format']}"


def read(path: Path = TRAININGS) -> list[Record]:
    """The committed records. Raises FileNotFoundError that says which command makes them."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; measure it with: python -m common trainings --write")
    return read_json(path)["trainings"]


def write(records: Iterable[Record], path: Path = TRAININGS) -> None:
    """In one order, whatever the order in which they ended."""
    write_json(path, {"trainings": sorted(records, key=lambda r: (r["recipe"], r["format"] != "float32", r["seed"]))})


def of(records: Iterable[Record], recipe: str) -> list[Record]:
    return [record for record in records if record["recipe"] == recipe]


def numbers_of(record: Record) -> dict[str, float]:
    """What a training decided, by the names of May's table: "sums of 5, unseen: right answers"."""
    found = {f"{name}, unseen: right answers": value for name, value in record["right"].items()}
    return found | {f"{domain}, test: base model": value for domain, value in record["bits per byte"].items()}


def spreads(records: Sequence[Record]) -> dict[str, list[float]]:
    """Each number over the trainings."""
    rows = [numbers_of(record) for record in records]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def shown(values: Sequence[float]) -> str:
    """Mean [lowest, highest].

    >>> shown([0.5, 0.7])
    '0.600 [0.500, 0.700]'
    """
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def table(records: Sequence[Record]) -> str:
    """A row for each number, a column for each recipe: mean [lowest, highest] over its trainings."""
    columns = {recipe: of(records, recipe) for recipe in dict.fromkeys(record["recipe"] for record in records)}
    heads = [f"{recipe}: {len(own)} trainings" for recipe, own in columns.items()]
    values = {recipe: spreads(own) for recipe, own in columns.items()}
    lines = [f"| mean [lowest, highest] | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    half = {recipe: [transition(record) for record in own] for recipe, own in columns.items()}
    said = [shown([1.0 if when is None else when for when in whens]) for whens in half.values()]
    lines.append(f"| half of the held-out additions right, share of the training | {' | '.join(said)} |")
    for name in next(iter(values.values()), ()):
        lines.append(f"| {name} | {' | '.join(shown(column[name]) for column in values.values())} |")
    return "\n".join(lines)


def transition(record: Record, rate: float = 0.5) -> float | None:
    """The share of the training after which this rate of held-out additions was right for the first time."""
    return next((point[0] for point in record["drills"] if point[1] >= rate), None)


def departures(fresh: Mapping[str, float], records: Sequence[Record]) -> list[str]:
    """Sentences about each number of a new training that lies where the published ones say that it will not."""
    known = spreads(records)
    return [
        f"{name}: {value:.3f}, published {shown(known[name])}"
        for name, value in fresh.items()
        if name in known and departs(value, known[name])
    ]
