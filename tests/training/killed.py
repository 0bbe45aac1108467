"""A training that is killed again and again, in children of a process that has imported torch and trained nothing.

    python -m tests.training.killed FOLDER              writes FOLDER/undisturbed, FOLDER/killed: histories and weights
    python -m tests.training.killed FOLDER NAME…        the same in FOLDER/NAME, for objectives of units.py, killed less

Half of the kills come at a moment chosen at random, the other half while a snapshot is being written.
"""

import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from common.foundation.files import read_json, sha256_file, write_json
from common.training.checkpoint import save_checkpoint
from common.training.objectives import Prefix
from common.training.snapshots import Snapshots
from tests.training.tiny import CONFIG, V, Words, stream_of, trainer_of
from tests.training.units import UNITS

KILLS, STEPS = 20, 80
FEWER, SHORTER = 4, 24  # of the objectives of units.py


def train(snapshots, done, name=None):
    """To the end, or as far as it gets. Its objective, dropout and optimizer all depend on what came before."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # also that a damaged snapshot was passed over: there must be none
    options = {
        "objective": Prefix(),
        "stream": stream_of(4, count=400),  # an epoch is 13 batches: several of them
        "byte_lengths": torch.ones(V),
        "steps": STEPS,
    }
    if name is not None:
        objective, stream, _ = UNITS[name]
        options = {"objective": objective(), "stream": stream(4), "steps": SHORTER}
    trainer = trainer_of(
        config=CONFIG.but(dropout=0.1),
        kind="muon",
        **options,
        accumulate=2,
        evaluate=lambda model, step: {"sum": float(sum(p.detach().sum() for p in model.parameters()))},
        evaluate_every=7,
        save_every=2,
        snapshots=Snapshots(snapshots),
        tokenizer=Words(),
    ).train()
    save_checkpoint(done, trainer.model, Words())
    write_json(done / "rows.json", {"history": trainer.history, "evaluations": trainer.evaluations})


def child(snapshots, done, name):
    """Its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        train(snapshots, done, name)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def partial(snapshots):
    """The snapshots that are being written, or were when their process died."""
    return {(path.name, path.stat().st_ctime_ns) for path in snapshots.glob(".*.partial") if path.exists()}


def kill(pid, snapshots, saving, rng):
    """Kill it when it saves for the first or second time, or soon after a whole snapshot; False if it had ended."""
    for _ in range(rng.choice((1, 1, 2)) if saving else 1):
        before = partial(snapshots) if saving else Snapshots(snapshots).all()[:1]
        while (partial(snapshots) if saving else Snapshots(snapshots).all()[:1]) in (before, set(), []):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.02 if saving else 0.04))
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def main(folder, name=None):
    rng = random.Random(0)
    trainer_of()  # imports what comes late, once
    assert os.waitpid(child(folder / "calm", folder / "undisturbed", name), 0)[1] == 0
    snapshots, seen = folder / "restless", []
    for number in range(KILLS if name is None else FEWER):
        pid = child(snapshots, folder / "killed", name)
        if not kill(pid, snapshots, number % 2 == 1, rng):
            break
        whole = Snapshots(snapshots).all()
        for file, digest in read_json(whole[0] / "progress.json")["files"].items() if whole else ():
            assert sha256_file(whole[0] / file) == digest, "a snapshot with a name is whole"
        seen.append([whole[0].name if whole else None, sorted(name for name, _ in partial(snapshots))])
    assert os.waitpid(child(snapshots, folder / "killed", name), 0)[1] == 0
    write_json(folder / "seen.json", seen)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        main(Path(sys.argv[1]) / name, name)
    if not sys.argv[2:]:
        main(Path(sys.argv[1]))
