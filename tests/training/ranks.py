"""What each process of a training on several does; test_distributed.py starts it with torchrun and compares.

torchrun --nproc-per-node N -m tests.training.ranks TASK FOLDER      writes FOLDER/TASK-<rank>-of-<N>.json
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch

from common.foundation.files import atomic_path, write_json
from common.model.transformer import Transformer
from common.training.distributed import World, spread
from common.training.snapshots import Snapshots, whole_tensors
from common.training.trainer import TrainingDiverged
from tests.training.tiny import CONFIG, Ragged, V, Words, stream_of, trainer_of

STEPS, ROWS, ACCUMULATE = 6, 6, 2
EXPERTS = CONFIG.but(experts=4, balance_loss=0.0)  # its balance is that of each micro-batch: no sum over processes
RUNS = {  # name -> (parallel, optimizer, config)
    "data-adamw": ("data", "adamw", CONFIG.but(tied=False, attention_bias=True, norm="layer")),
    "data-muon": ("data", "muon", CONFIG),
    "shards-adamw": ("shards", "adamw", CONFIG),
    "shards-muon": ("shards", "muon", EXPERTS.but(tied=False)),
}
RESUMED = ("shards-adamw", "shards-muon")


class Reporting(Ragged):
    """Reports something beside its loss: processes add that up as well."""

    def loss(self, model, prepared):
        terms = super().loss(model, prepared)
        return terms._replace(logged={"twice": 2 * terms.sum})


def trainer(name, world, folder=None, how=None, **options):
    """ROWS rows over all processes in each micro-batch."""
    parallel, kind, config = RUNS[name]
    model = Transformer(config, seed=1)
    if world is not None:
        model = world.wrap(model, how or parallel)
        options |= {"world": world}
    world = world or World()
    stream = stream_of(ROWS // world.size, rank=world.rank, world_size=world.size)
    if folder is not None:
        options |= {"snapshots": Snapshots(folder), "tokenizer": Words()}
    return trainer_of(
        model=model, kind=kind, stream=stream, steps=STEPS, accumulate=ACCUMULATE, objective=Reporting(), clip=0.5,
        byte_lengths=torch.arange(V) % 4, evaluate=held_out, evaluate_every=1, **options,
    )  # fmt: skip


def held_out(model, done):
    return {"logit": float(model(torch.ones(1, 4, dtype=torch.int64)).logits.sum())}


def killed_once(world, folder):
    """One process of the first attempt dies in update 4; the second attempt goes on from the snapshot of update 2."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def die(row):
        if first and row["step"] == 3 and "loss" in row and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    training = trainer("shards-muon", world, folder / "killed", watch=die, save_every=2)
    begun = training.resume()
    return {"first": first, "resumed": begun, "from": training.done, "rows": training.train().history}


def diverging(name, world):
    """NaN in one process only: all of them stop, and that one knows where it came from."""
    training = trainer(name, world)
    training.update()
    before = {n: t.clone() for n, t in whole_tensors(training.model).items()}
    if world.rank == 1:
        blocks = training.model.module.blocks if RUNS[name][0] == "data" else training.model.blocks
        blocks[1].attention.register_forward_hook(lambda _m, _i, output: output * math.nan)
    try:
        training.update()
    except TrainingDiverged as error:
        after = whole_tensors(training.model)
        return {"error": str(error), "same": all(torch.equal(before[n], after[n]) for n in before)}


def two(world, folder):
    found = {"killed": killed_once(world, folder)}
    for name in RUNS:
        training = trainer(name, world, folder / name)
        training.train(3)
        training.snapshots = None  # what is saved stays at update 3
        found[name] = {"rows": training.train().history, "evaluations": training.evaluations}
        whole = whole_tensors(training.model)
        if world.rank == 0:
            safetensors.torch.save_file({n: t.contiguous() for n, t in whole.items()}, folder / f"{name}.safetensors")
        found[f"nan-{name}"] = diverging(name, world)
    try:
        trainer("data-muon", world, how="none")
    except ValueError as error:
        found["none"] = str(error)
    return found


def resume(world, folder):
    found = {}
    for name in RESUMED:
        training = trainer(name, world, folder / f"{name}-on-{world.size}")
        found[name] = {"resumed": training.resume(), "from": training.done, "rows": training.train().history}
    return found


def spread_works(world, folder, fails):
    """What `spread` starts: rank 1 fails, or both add up their ranks plus one."""
    write_text(folder / str(world.rank), str(os.getpid()))
    if fails:
        while world.rank == 0 or not (folder / "0").exists():
            time.sleep(0.01)
        raise ArithmeticError("rank 1 has had enough")
    total = float(world.sum(torch.tensor(world.rank + 1.0)))
    write_json(folder / f"{world.rank}.json", [world.rank, world.size, torch.get_num_threads(), total])


def sleeps(world, folder):
    write_text(folder / str(world.rank), str(os.getpid()))
    time.sleep(3600)


def spread_for_ever(folder):
    spread(sleeps, 2, Path(folder))


def write_text(path, text):
    """Whole or absent."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, folder = sys.argv[1], Path(sys.argv[2])
    with World.joined() as world:
        found = {"two": two, "resume": resume}[task](world, folder)
        write_json(folder / f"{task}-{world.rank}-of-{world.size}.json", found)
