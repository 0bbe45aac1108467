"""How far apart trainings of one recipe end: three seeds and two number formats of the base model, old recipe and new.

An interval over questions says what another set of questions would have given the *same* model. Nothing in it says what
another seed, or another processor with its own roundings, would have given. For that one has to train again.

`05_pretraining/trainings.json` holds one record a training. It is measured by `python -m common trainings --write`, which
takes an hour and a half on two cores, and committed; the article's table and figure are made from it, and the year compares
its own base model with it.
"""

import contextlib
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from common.evaluation.drills import score_drills
from common.foundation.device import matmul_flops
from common.foundation.files import read_json, write_json
from common.foundation.machine import cpu_name
from common.foundation.months import ROOT
from common.foundation.parallel import each
from common.foundation.plots import curves
from common.foundation.statistics import departs
from common.generation.engine import Engine
from common.model.config import ModelConfig
from common.studies import base
from common.tokenization.bpe import BPETokenizer
from common.training.distributed import World
from common.training.rounding import rounded_products

TRAININGS = ROOT / "05_pretraining" / "trainings.json"
FORMATS = ("float32", "bfloat16")
SEEDS = (0, 1, 2)
LOOKS = 20  # points of the curves
Record = dict[str, Any]


def key(record: Mapping[str, Any]) -> str:
    return f"{record['recipe']}, seed {record['seed']}, {record['format']}"


def train_one(
    recipe: str,
    seed: int,
    format: str,
    *,
    tokenizer: str,
    shape: Mapping[str, Any],
    shares: Mapping[str, float],
    bytes_in_all: int,
    rows: int,
    rates: Mapping[str, Any],
    questions: int,
    folder: str,
) -> Record:
    """One base training from its text to its answers, in one process. Killed, it goes on from its last snapshot.

    Args:
        recipe: a name in `base.RECIPES`.
        format: of the matrix products; bfloat16 is rounded in fp32 on a processor without such instructions.
        rates: optimizer, learning_rate, weight_decay.
        folder: for the stream and the snapshots; what it holds is deleted at the end.
    """
    words = BPETokenizer.load(tokenizer).truncated(shape["vocab_size"])
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    data = base.base_data(words, shares, bytes_in_all, seed, base.RECIPES[recipe])
    np.save(place / "stream.npy", data.ids)
    words.save(place / "tokenizer.json")
    config = ModelConfig(**shape)
    updates = len(data.ids) // (rows * config.context_length)
    native = format == "float32" or matmul_flops("cpu", torch.bfloat16) > 0.5 * matmul_flops("cpu", torch.float32)
    job = base.Pretraining(
        config, str(place / "stream.npy"), str(place / "tokenizer.json"), str(place / "snapshots"), data.looks, rows,
        max(1, updates // LOOKS), seed, dtype=format if native else "float32", **rates,
    )  # fmt: skip
    trainer, curve = job.trainer(World()), []
    trainer.label = f"{recipe}, seed {seed}, {format}"

    def look(model: torch.nn.Module, done: int) -> dict[str, float]:
        score = score_drills(model, words, base.held_out_drills())
        return {"whole": score.whole, "first": score.first, "last": score.last}

    trainer.evaluate = look
    with contextlib.nullcontext() if native else rounded_products():
        trainer.train()
    model = trainer.model
    curve = [
        [round(row["step"] / updates, 3), *(round(row[name], 3) for name in ("whole", "first", "last"))]
        for row in trainer.evaluations
    ]
    solved = base.answers(Engine(model, words), questions)
    scores = base.by_domain(model, words, base.test_documents(0))
    shutil.rmtree(place)
    return {
        "recipe": recipe, "seed": seed, "format": format, "products": format if native else "bfloat16, rounded in float32",
        "processor": cpu_name(), "kernels": torch.backends.cpu.get_cpu_capability(), "tokens": len(data.ids),
        "updates": updates, "questions": questions,
        "right": {name: round(found["answer"].mean, 4) for name, found in solved.items()},
        "every step right": {name: round(found["trace"].mean, 4) for name, found in solved.items()},
        "bits per byte": {name: round(value.mean, 4) for name, value in scores.items()},
        "drills": curve,
    }  # fmt: skip


def measure(
    recipes: Sequence[str],
    seeds: Sequence[int],
    formats: Sequence[str],
    scratch: Path,
    *,
    keep: Callable[[Record], None] = lambda record: None,
    known: Iterable[Record] = (),
    **given: Any,
) -> list[Record]:
    """Train what is not in `known` yet, one process a core; `keep` gets each record as soon as it is there."""
    there = {key(record) for record in known}
    jobs = [
        {"recipe": recipe, "seed": seed, "format": format, **given}
        for recipe in recipes for format in formats for seed in seeds
    ]  # fmt: skip
    jobs = [{**job, "folder": str(scratch / key(job).replace(", ", "-"))} for job in jobs if key(job) not in there]
    return each(train_one, jobs, label="base trainings", seen=lambda job, record: keep(record))


def read(path: Path = TRAININGS) -> list[Record]:
    """The committed records. Raises FileNotFoundError that says which command makes them."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; measure it with: python -m common trainings --write")
    return read_json(path)["trainings"]


def write(records: Iterable[Record], path: Path = TRAININGS) -> None:
    """Sorted, so that the order of the trainings does not show."""
    write_json(
        path,
        {
            "trainings": sorted(
                records, key=lambda r: (list(base.RECIPES).index(r["recipe"]), r["format"] != "float32", r["seed"])
            )
        },
    )


def of(records: Iterable[Record], recipe: str) -> list[Record]:
    return [record for record in records if record["recipe"] == recipe]


def numbers_of(record: Record) -> dict[str, float]:
    """What a training decided, by the names of May's table: "sums of 5, unseen: right answers"."""
    found = {f"{name}, unseen: right answers": value for name, value in record["right"].items()}
    return found | {f"{domain}, test: base model": value for domain, value in record["bits per byte"].items()}


def spreads(records: Sequence[Record]) -> dict[str, list[float]]:
    """Each number over the trainings."""
    rows = [numbers_of(record) for record in records]
    return {name: [row[name] for row in rows] for name in rows[0]}


def table(records: Sequence[Record]) -> str:
    """A row for each number, a column for each recipe: mean [lowest, highest] over its trainings."""
    recipes = [name for name in base.RECIPES if of(records, name)]
    counts = {name: len(of(records, name)) for name in recipes}
    head = (
        "| over trainings: mean [lowest, highest] | "
        + " | ".join(f"{n}, {counts[n]} trainings" for n in recipes)
        + " |"
    )
    columns = {name: spreads(of(records, name)) for name in recipes}
    lines = [head, "|---" * (len(recipes) + 1) + "|"]
    for row in columns[recipes[0]]:
        lines.append(f"| {row} | {' | '.join(shown(columns[name][row]) for name in recipes)} |")
    return "\n".join(lines)


def transition(record: Record, rate: float = 0.5) -> float | None:
    """The share of the training after which this rate of held-out drills was right for the first time."""
    return next((point[0] for point in record["drills"] if point[1] >= rate), None)


def figure(records: Sequence[Record]) -> Figure:
    """Held-out drills over the training: a line for each training, a colour for each recipe."""
    lines = {key(record): [point[1] for point in record["drills"]] for record in records}
    at = {key(record): [point[0] for point in record["drills"]] for record in records}
    return curves(
        at, lines, title="Held-out additions, right as a whole", xlabel="share of the training", ylabel="rate"
    )


def departures(fresh: Mapping[str, float], records: Sequence[Record]) -> list[str]:
    """Sentences about each number of a new training that lies where the published ones say that it will not."""
    known = spreads(records)
    return [
        f"{name}: {value:.3f}, published {shown(known[name])}"
        for name, value in fresh.items()
        if name in known and departs(value, known[name])
    ]


def shown(values: Sequence[float]) -> str:
    """Mean [lowest, highest].

    >>> shown([0.5, 0.7])
    '0.600 [0.500, 0.700]'
    """
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
