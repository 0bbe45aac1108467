"""Training the base model again and again: three seeds and two number formats, the old recipe and the new one.

The records, and what they say together, are in common/foundation/trainings.py.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.evaluation.drills import score_drills
from common.foundation.device import pick_device
from common.foundation.machine import cpu_name
from common.foundation.months import ROOT
from common.foundation.parallel import each
from common.foundation.plots import COLOURS, use_style
from common.foundation.trainings import Record, key
from common.generation.engine import Engine
from common.model.config import ModelConfig
from common.studies import base
from common.tokenization.bpe import BPETokenizer
from common.training.distributed import World

FORMATS = ("float32", "bfloat16")
SEEDS = (0, 1, 2)
LOOKS = 20  # points of the curves
PICTURE = ROOT / "05_pretraining" / "trainings.png"  # in the article


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
    native = format == "float32" or pick_device("cpu").has_bf16
    job = base.Pretraining(
        config, str(place / "stream.npy"), str(place / "tokenizer.json"), str(place / "snapshots"), data.looks, rows,
        max(1, updates // LOOKS), seed, dtype=format if native else "float32", **rates,
    )  # fmt: skip
    trainer, curve = job.trainer(World()), []
    trainer.label = f"{recipe}, seed {seed}, {format}"

    def look(model: torch.nn.Module, done: int) -> dict[str, float]:
        score = score_drills(model, words, base.held_out_drills())
        return {"whole": score.whole, "last": score.last}

    trainer.evaluate = look
    trainer.settings.rounded = not native
    trainer.train()
    model = trainer.model
    curve = [
        [round(row["step"] / updates, 3), *(round(row[name], 3) for name in ("whole", "last"))]
        for row in trainer.evaluations
    ]
    solved = base.answers(Engine(model, words), questions)
    scores = base.by_domain(model, words, base.test_documents(0))
    shutil.rmtree(place)
    return {
        "recipe": recipe, "seed": seed, "format": format, "products": format if native else "bfloat16, rounded in float32",
        "processor": cpu_name(), "kernels": torch.backends.cpu.get_cpu_capability(), "tokens": len(data.ids),
        "updates": updates, "processes": 1, "questions": questions,
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


def figure(records: Sequence[Record]) -> Figure:
    """Held-out additions over the training: a line for each training, a colour for each recipe, dashed in bf16."""
    use_style()
    drawn, axes = plt.subplots()
    colours = dict(zip(dict.fromkeys(record["recipe"] for record in records), COLOURS, strict=False))
    for record in records:
        dashed = record["format"] == "bfloat16"
        axes.plot(
            [point[0] for point in record["drills"]], [point[1] for point in record["drills"]],
            color=colours[record["recipe"]], linestyle="--" if dashed else "-", label=key(record), alpha=0.8,
        )  # fmt: skip
    axes.set(title="Additions that no drill states", xlabel="share of the training", ylabel="right as a whole")
    handles = [Line2D([], [], color=colour, label=recipe) for recipe, colour in colours.items()]
    handles.append(Line2D([], [], color="0.4", linestyle="--", label="products in bf16"))
    axes.legend(handles=handles, loc="lower right")
    return drawn
