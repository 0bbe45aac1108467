"""May: pretrain the base model of the year, and find out what a training is made of.

Several processes: torchrun --nproc-per-node 2 05_pretraining/run.py --parallel data (or shards).
"""

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from common.foundation.device import pick_device
from common.foundation.run import Run, announce, needed, run_directory, script
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.studies import base, trials
from common.tokenization.bpe import BPETokenizer
from common.training.checkpoint import load_checkpoint, model_fingerprint, save_checkpoint
from common.training.distributed import World, spread
from common.training.snapshots import whole_tensors
from common.training.trainer import Trainer

INPUTS = ("02_tokenization", "shakespeare", "wiki", "web")


@dataclass(frozen=True)
class Config:
    """None: what the size implies."""

    size: str = "small"
    seed: int = 0
    vocab_size: int | None = None  # of February's tokenizer, cut back to its first merges
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    length: int | None = None  # tokens in a row
    rows: int | None = None  # of an update, over all processes and micro-batches
    accumulate: int = 1
    megabytes: float | None = None  # of text; a small source is repeated, and the plan says how often
    plays: float = 0.34  # shares of the text
    wiki: float = 0.1
    web: float = 0.06
    arithmetic: float = 0.5
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    looks: int | None = None  # evaluations on the way
    questions: int | None = None  # of each kind of problem at the end
    studies: float | None = None  # length of the small studies; 1 is what the article shows
    processes: int | None = None  # on a machine without GPUs, started here; with torchrun say how to share below
    parallel: Literal["none", "data", "shards"] = "none"
    plan: bool = False  # only say what the training would take

    def shape(self) -> ModelConfig:
        """Of the model."""
        return ModelConfig(self.vocab_size, self.length, self.layers, self.width, self.heads, init="fan_in")


SIZES = {
    "tiny": {"vocab_size": 512, "layers": 1, "width": 16, "heads": 2, "length": 32, "rows": 4, "megabytes": 0.01,
             "looks": 2, "questions": 3, "studies": 0.01, "processes": 2},
    "small": {"vocab_size": 2048, "layers": 4, "width": 128, "heads": 4, "length": 256, "rows": 8, "megabytes": 7.5,
              "looks": 10, "questions": 200, "studies": 1.0, "processes": 2},
    "medium": {"vocab_size": 4096, "layers": 12, "width": 512, "heads": 8, "length": 512, "rows": 128,
               "megabytes": 60.0, "looks": 20, "questions": 200, "studies": 1.0, "processes": 1},
    "large": {"vocab_size": 8192, "layers": 24, "width": 1024, "heads": 16, "length": 1024, "rows": 512,
              "megabytes": 300.0, "looks": 20, "questions": 200, "studies": 1.0, "processes": 1},
}  # fmt: skip


def main(config: Config) -> None:
    check(config)
    device, words = pick_device(), needed("02_tokenization", config.size) / "tokenizer.json"
    tokenizer = BPETokenizer.load(words).truncated(config.vocab_size)
    shape = config.shape()
    folder, run = run_directory("05_pretraining", config), None
    with contextlib.ExitStack() as opened:
        with World.joined(device.name) as world:
            alone = world.size == 1 and device.name == "cpu"  # then processes are started here
            processes = config.processes if alone else world.size
            data = base.base_data(tokenizer, base.shares_of(config), round(1e6 * config.megabytes), config.seed)
            updates = len(data.ids) // (config.length * config.rows)
            if updates < config.looks:
                raise ValueError(
                    f"megabytes {config.megabytes} is enough for {updates} updates: raise it, or lower rows"
                )
            job = base.Pretraining(
                shape, *(str(folder / name) for name in ("stream.npy", "model/tokenizer.json", "snapshots")), data.looks,
                config.rows, updates // config.looks, config.seed, config.accumulate, config.optimizer,
                config.learning_rate, config.weight_decay, world.same(str(device.dtype).removeprefix("torch.")),
                device.peak_flops / (processes if alone else 1), config.parallel,
            )  # fmt: skip
            if world.rank == 0:
                announce(base.plan(job, data, device, processes))
            if config.plan:
                return
            if world.rank == 0:
                run = opened.enter_context(Run("05_pretraining", config, inputs=INPUTS))
                np.save(folder / "stream.npy", data.ids)
                tokenizer.save(folder / "model/tokenizer.json")
            world.meet()  # the first has made the files
            if alone and processes > 1:
                spread(base.train, processes, replace(job, parallel="data"))
            trainer = job.trainer(world)  # finds what those have left, if there were any
            trainer.watch = None if run is None else lambda row: run.log(**row)
            tensors = whole_tensors(trainer.train().model)
        if run is not None:
            save_checkpoint(run.path("model"), Transformer(shape), tokenizer, tensors=tensors)
            report(run, config, tokenizer, data, trainer)


def check(config: Config) -> None:
    """Say at once what would fail after minutes."""
    for name in ("rows", "accumulate", "looks", "questions", "processes", "length"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.parallel != "none" and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"parallel {config.parallel} is for torchrun; without it, set processes and leave parallel out"
        )


def report(run: Run, config: Config, tokenizer: BPETokenizer, data: base.BaseData, trainer: Trainer) -> None:
    """Baselines, what it can do, and the small studies."""
    model, stream = load_checkpoint(run.path("model"), tokenizer), run.path("stream.npy")
    claims, rows, figures, samples, spent = base.report(
        model, tokenizer, data, trainer, run.path, seed=config.seed, questions=config.questions
    )
    given = {"width": round(1.5 * config.width), "rows": config.rows, "updates": trainer.settings.evaluate_every,
             "length": config.length, "looks": data.looks}  # fmt: skip
    found = trials.answers(
        trials.jobs(config.studies, str(stream), str(run.path("model/tokenizer.json")), given), run.path("studies.json")
    )
    said, more, shown = trials.report(found, run.path, trainer, data, tokenizer, config.studies)
    stream.unlink()
    shutil.rmtree(run.path("snapshots"))  # they were for a kill
    run.spend(trained=len(data.ids), flops=3 * trainer.flops_per_token * len(data.ids), **spent)
    trained_on = {"weights": model_fingerprint(model), "mixture": data.shares, "dtype": str(trainer.settings.dtype)}
    run.identify(tokenizer=tokenizer.fingerprint, model=trained_on, measurement={"questions": config.questions})
    run.finish({"title": "Pretraining with an honest loop", "claims": claims + said, "numbers": rows + more,
                "figures": figures + shown, "samples": samples})  # fmt: skip


if __name__ == "__main__":
    script(__name__)
