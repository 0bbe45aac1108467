"""Probes of anybody's runs: repeated, interrupted, resumed, killed while saving, poisoned with a NaN."""

import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from common.diagnostics.core import Reading, probe
from common.diagnostics.probes.training import differing, some


@probe("run-twice", "does the same run give the same weights?")
def run_twice(training: Callable) -> Reading:
    """Four updates, twice."""
    changed = differing(training(4, None), training(4, None))
    return Reading(float(len(changed)), 0.0, f"tensors that differ: {some(changed)}")


@probe("bitwise-resume", "does a resumed training end with the bits of an undisturbed one?")
def bitwise_resume(training: Callable, *, updates: int = 6) -> Reading:
    """Stopped early, and stopped twice: weights, optimizer state, position in the data and dropout must all come back."""
    undisturbed, wrong = training(updates, None), []
    for stops in ((1,), (2, 4)):
        with tempfile.TemporaryDirectory() as folder:
            for stop in stops:
                training(stop, Path(folder))
            if differing(undisturbed, training(updates, Path(folder))):
                wrong.append(" and ".join(map(str, stops)))
    return Reading(float(len(wrong)), 0.0, f"of 2 interrupted runs differ; stopped after {'; '.join(wrong) or 'none'}")


@probe("strict-load", "is a checkpoint with other names refused, or else loaded?")
def strict_load(load_weights: Callable, module: nn.Module) -> Reading:
    """Names with the prefix of a wrapper, and a tensor missing: an error is right, and so are the weights."""
    generator = torch.Generator().manual_seed(1)
    given = {name: torch.randn(p.shape, generator=generator) for name, p in module.state_dict().items()}
    states = {f"prefix {p}": {p + n: t for n, t in given.items()} for p in ("_orig_mod.", "module.")}
    states["one tensor missing"] = dict(list(given.items())[:-1])
    wrong = []
    for what, state in states.items():
        try:
            kept = load_weights({name: tensor.clone() for name, tensor in state.items()}).state_dict()
        except Exception:
            continue
        if any(not kept[name].equal(tensor) for name, tensor in given.items()):
            wrong.append(what)
    return Reading(float(len(wrong)), 0.0, f"of {len(states)} taken without a word: {some(wrong)}")


class _Killed(BaseException):
    """As a kill: nothing that follows reaches the disk."""


class _Trap:
    """Stops this thread at its nth change of the file system, and at every one after: Python says when one is due."""

    EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree")
    installed = False
    thread: int | None = None
    left = 0

    @classmethod
    def heard(cls, event: str, arguments: tuple) -> None:
        if cls.thread is None or threading.get_ident() != cls.thread:
            return
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        if event in cls.EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & writes):
            cls.left -= 1
            if cls.left < 0:
                raise _Killed

    @classmethod
    def survives(cls, what: Callable[[], object], changes: int) -> bool:
        """True if `what()` was done with so many changes."""
        if not cls.installed:
            sys.addaudithook(cls.heard)  # it stays for good, and sleeps
            cls.installed = True
        cls.thread, cls.left = threading.get_ident(), changes
        try:
            what()
        except _Killed:
            return False
        finally:
            cls.thread = None
        return True


@probe("kill-during-save", "is there a whole snapshot at every moment of a save?")
def kill_during_save(save_numbered: Callable, newest_number: Callable, *, most: int = 200) -> Reading:
    """Save number 1; then save number 2 and die at the first change of the file system, the second, and so on.

    The value counts the moments after which neither 1 nor 2 can be read. What libraries write outside Python is not
    seen, so a death in the middle of a file is not among them: `truncation` asks about that.
    """
    lost = []
    for changes in range(most):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_numbered(folder, 1)
            done = _Trap.survives(lambda folder=folder: save_numbered(folder, 2), changes)
            try:
                found = newest_number(folder)
            except Exception:
                found = None
            if found not in ((2,) if done else (1, 2)):
                lost.append(changes)
        if done:
            return Reading(float(len(lost)), 0.0, f"of {changes + 1} moments leave nothing to resume from")
    raise ValueError(f"a save of more than {most} changes of the file system: give the probe a larger `most`")


@probe("finite-state", "is a loss that is not a number said, and kept out of the weights?")
def finite_state(poisoned_training: Callable) -> Reading:
    """The loss of the third update is NaN. Afterwards the weights must be finite, and something must name update 2 or 3."""
    weights, said = poisoned_training()
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    told = any(number in said.replace(",", " ").replace(":", " ").split() for number in ("2", "3"))
    return Reading(float(bool(bad)) + float(not told), 0.0, f"not finite: {some(bad)}; said: {said[:40] or 'nothing'}")
