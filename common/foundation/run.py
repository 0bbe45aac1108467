"""Runs, not memories: every result comes with the record of what made it.

    runs/<month>/<size>-<config hash>/
        manifest.json    what ran: config, inputs, code, packages, machine, cost, status
        metrics.jsonl    what was logged on the way
        summary.json     what came out
        ...              artifacts: checkpoints, figures, traces

A run is finished when its manifest says so, and the manifest says so last: after the summary and every artifact are
on disk, with their hashes in it. A run that raised is `crashed`; one that was killed still says `running` with a
process that is gone, and reads as `interrupted`. Neither is ever returned by `latest`.
"""

import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import filelock
import psutil

from common.foundation import machine
from common.foundation.code import code_hashes, git_state
from common.foundation.config import as_dict, config_hash, resolve
from common.foundation.files import (
    append_json_line,
    read_json,
    set_aside,
    sha256_file,
    sha256_json,
    write_json,
)
from common.foundation.months import ROOT, load, month

PACKAGES = ("torch", "numpy", "safetensors", "matplotlib", "tiktoken", "transformers", "reasoning-gym")


def runs_root() -> Path:
    """`$SPINE_RUNS`, or `runs/` in the repository."""
    return Path(os.environ.get("SPINE_RUNS") or ROOT / "runs")


def content_key(folder: str, config: Any, inputs: dict[str, str]) -> str:
    """What decides the result of a run: config, inputs, code, torch and numpy. Equal keys: no need to run again."""
    code = code_hashes(ROOT / month(folder).folder / "run.py")
    versions = {name: version for name, version in _versions().items() if name in ("torch", "numpy")}
    return sha256_json({"config": as_dict(config), "inputs": inputs, "code": code, "versions": versions})


def run_directory(folder: str, config: Any, root: Path | None = None) -> Path:
    return (root or runs_root()) / month(folder).folder / f"{config.size}-{config_hash(config)}"


def status(directory: str | Path) -> str:
    """One of "absent", "running", "interrupted", "crashed", "damaged", "finished".

    "damaged" is a run that finished, but whose summary or artifacts are no longer what its manifest says.
    """
    directory = Path(directory)
    if not (directory / "manifest.json").exists():
        return "absent"
    try:
        manifest = read_json(directory / "manifest.json")
    except ValueError:
        return "damaged"
    if manifest["status"] == "running":
        return "running" if manifest["process"] == _process(manifest["process"]["pid"]) else "interrupted"
    if manifest["status"] == "finished":
        for name, digest in manifest["artifacts"].items():
            path = directory / name
            if not path.exists() or sha256_file(path) != digest:
                return "damaged"
    return manifest["status"]


def _process(pid: int) -> dict[str, Any] | None:
    """What tells a process from a later one with the same number, and from one on another machine."""
    try:
        return {"host": platform.node(), "pid": pid, "started": round(psutil.Process(pid).create_time(), 1)}
    except psutil.NoSuchProcess:
        return None


def latest(folder: str, size: str) -> Path | None:
    """The directory of the newest finished run of that month and size, whatever its config, or None."""
    folder = month(folder).folder
    candidates = [
        path
        for path in (runs_root() / folder).glob(f"{size}-*")
        if "." not in path.name and path.is_dir() and status(path) == "finished"
    ]
    return max(candidates, key=lambda path: read_json(path / "manifest.json")["ended"], default=None)


def official(folder: str, size: str) -> Path | None:
    """The finished run of a month as its size defines it, no field overridden: what the year reports and builds on."""
    directory = run_directory(folder, configure(load(folder, "run"), size=size))
    return directory if status(directory) == "finished" else None


def needed(folder: str, size: str) -> Path:
    """Like `official`, but raises FileNotFoundError that says which command makes the run."""
    found = official(folder, size)
    if found is None:
        raise FileNotFoundError(
            f"no finished run of {folder} at size {size} under {runs_root()}. "
            f"Make one: python -m common month {month(folder).number} --size {size}"
        )
    return found


def configure(module: ModuleType, **fields: Any) -> Any:
    """The resolved config of a month's run.py: its Config with what the size implies filled in."""
    return resolve(module.Config(**fields), module.SIZES)


def planned(folder: str, config: Any) -> tuple[Path, str]:
    """Where a run of this month and config would go, and its content key today."""
    module = load(folder, "run")
    return run_directory(folder, config), content_key(folder, config, input_hashes(module.INPUTS, config.size))


def input_hashes(names: tuple[str, ...], size: str) -> dict[str, str]:
    """The identity of each input: the pinned hash of an asset, or the content key of an earlier month's run."""
    from common.foundation.assets import pinned_hash

    return {
        name: read_json(needed(name, size) / "manifest.json")["content_key"]
        if name[:2].isdigit()
        else pinned_hash(name)
        for name in names
    }


def ensure(folder: str, size: str = "small", *, force: bool = False, **overrides: Any) -> Path:
    """The directory of the finished run of a month with today's code and inputs; made now if there is none.

    A month's run.py holds `Config` (a dataclass with `size` and `seed`), `SIZES`, `INPUTS` (names of assets, or folders
    of earlier months) and `main(config)`, which makes the run. Earlier months that it needs are made first. `overrides`
    are fields of the month's Config.
    """
    module = load(folder, "run")
    for name in module.INPUTS:
        if name[:2].isdigit():
            ensure(name, size)
    config = configure(module, size=size, **overrides)
    directory, key = planned(folder, config)
    unchanged = status(directory) == "finished" and read_json(directory / "manifest.json")["content_key"] == key
    if unchanged and not force:
        announce(f"{month(folder).folder}: nothing changed since {directory.name}; not run again")
    else:
        if force and directory.exists():
            with _locked(directory):
                set_aside(directory)
        announce(f"{month(folder).folder}, size {size} -> {directory}")
        module.main(config)
    return directory


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a run directory, or raise RuntimeError if another process has it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{directory}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RuntimeError(
            f"{directory} is being written by another process. Wait for it, "
            "or change the config or $SPINE_RUNS to run beside it."
        ) from None
    try:
        yield
    finally:
        lock.release()


class Run:
    """A run in progress: `with Run("01_spine", config, inputs=("shakespeare",)) as run: …`.

    Entering creates or resumes the directory. Resuming keeps the artifacts of an interrupted run only if its content
    key is the same; anything else is set aside under a numbered name. Leaving without `finish` is an error.

    Args:
        folder: the month.
        config: a dataclass with `size` and `seed`.
        inputs: names of assets, or folders of earlier months, that the result depends on.
        root: instead of `$SPINE_RUNS` or `runs/`.
    Attributes:
        directory: where everything goes.
        resumed: True if an interrupted attempt with the same content key left its files here.
    """

    def __init__(self, folder: str, config: Any, *, inputs: tuple[str, ...] = (), root: Path | None = None) -> None:
        self.folder = month(folder).folder
        self.config = config
        self.directory = run_directory(folder, config, root)
        self.resumed = False
        self._inputs = input_hashes(inputs, config.size)
        self._summary: dict[str, Any] | None = None
        self._lock = _locked(self.directory)
        self._earlier = {"wall_seconds": 0.0, "cpu_seconds": 0.0}

    def __enter__(self) -> Self:
        self._lock.__enter__()
        try:
            self._start()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        code = code_hashes(ROOT / self.folder / "run.py")
        key = content_key(self.folder, self.config, self._inputs)
        attempts = 1
        if self.directory.exists():
            try:
                before = read_json(self.directory / "manifest.json")
            except (ValueError, FileNotFoundError):
                before = {}
            self.resumed = before.get("content_key") == key and before.get("status") in ("running", "crashed")
            if self.resumed:
                attempts = before["attempts"] + 1
                self._earlier = {name: before.get(name, 0.0) for name in self._earlier}  # a killed attempt left no bill
                (self.directory / "metrics.jsonl").unlink(missing_ok=True)
            else:
                set_aside(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._wall, self._cpu = time.perf_counter(), machine.cpu_seconds()
        self.manifest: dict[str, Any] = {
            "format": 1,
            "month": self.folder,
            "size": self.config.size,
            "status": "running",
            "process": _process(os.getpid()),
            "attempts": attempts,
            "content_key": key,
            "config": as_dict(self.config),
            "seed": self.config.seed,
            "inputs": self._inputs,
            "tokenizer": None,
            "identity": {"model": {}, "measurement": {}},
            "code": code,
            "git": git_state(),
            "packages": {"python": platform.python_version(), **_versions()},
            "machine": machine.describe_machine(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "tokens": {},
            "flops": 0,
        }
        self._write()

    def _write(self) -> None:
        write_json(self.directory / "manifest.json", self.manifest)

    def path(self, name: str) -> Path:
        """The path of an artifact with this name."""
        return self.directory / name

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        append_json_line(self.directory / "metrics.jsonl", values)

    def identify(self, *, tokenizer: str, model: dict[str, Any], measurement: dict[str, Any]) -> None:
        """Record what the numbers are numbers of.

        Args:
            tokenizer: its fingerprint.
            model: whatever, changed, makes it another model (weights, training data).
            measurement: whatever, changed, makes it another measurement (test data, unit, rules).
        `common.foundation.compare` answers from these two whether the model or the measurement changed.
        """
        self.manifest["tokenizer"] = tokenizer
        self.manifest["identity"] = {"model": model, "measurement": measurement}
        self._write()

    def spend(self, *, flops: int = 0, **tokens: int) -> None:
        """Add to the bill: arithmetic operations, and tokens by kind (`trained=…`, `scored=…`, `generated=…`)."""
        self.manifest["flops"] += int(flops)
        for kind, count in tokens.items():
            self.manifest["tokens"][kind] = self.manifest["tokens"].get(kind, 0) + int(count)

    def finish(self, summary: dict[str, Any]) -> None:
        """Hand over the summary. It is written when the block ends; its numbers must not depend on the clock."""
        self._summary = summary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self._commit()
        except BaseException as late:
            error = late
            raise
        finally:
            if error is not None:
                (self.directory / "summary.json").unlink(missing_ok=True)
                self._close("crashed", error="".join(traceback.format_exception_only(error)).strip())
            self._lock.__exit__(None, None, None)

    def _commit(self) -> None:
        """Write the summary, then the status with the hash of everything that it vouches for: the commit point."""
        if self._summary is None:
            raise RuntimeError("the run ended without run.finish(summary)")
        write_json(self.directory / "summary.json", self._summary)
        artifacts = {
            path.relative_to(self.directory).as_posix(): sha256_file(path)
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and path.name != "manifest.json" and not path.name.endswith(".partial")
        }
        self._close("finished", artifacts=artifacts)

    def _close(self, status: str, **more: Any) -> None:
        self.manifest["status"] = status
        self.manifest["ended"] = datetime.now(UTC).isoformat(timespec="microseconds")
        self.manifest["wall_seconds"] = round(self._earlier["wall_seconds"] + time.perf_counter() - self._wall, 3)
        self.manifest["cpu_seconds"] = round(self._earlier["cpu_seconds"] + machine.cpu_seconds() - self._cpu, 3)
        self.manifest["peak_memory_bytes"] = machine.peak_memory_bytes()
        self.manifest.update(more)
        self._write()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def result(directory: str | Path) -> dict[str, Any]:
    """The summary of a finished run with its cost: what the last line on standard output shows."""
    directory = Path(directory)
    manifest, summary = read_json(directory / "manifest.json"), read_json(directory / "summary.json")
    cost = {name: manifest[name] for name in ("wall_seconds", "cpu_seconds", "peak_memory_bytes", "tokens", "flops")}
    return {**summary, "run": str(directory), "cost": cost}


def announce(text: str) -> None:
    """Say something to a person: on standard error, because standard output ends with one JSON object."""
    print(text, file=sys.stderr, flush=True)


def script(module_name: str) -> None:
    """What `python <month>/run.py` does: read the config from the command line, run, print the result as JSON."""
    import tyro

    module = sys.modules[module_name]
    config = resolve(tyro.cli(module.Config, description=module.__doc__), module.SIZES)
    announce(f"config: {json.dumps(as_dict(config))}")
    module.main(config)
    folder = Path(module.__file__).resolve().parent.name
    directory = run_directory(folder, config)
    if os.environ.get("RANK", "0") == "0" and status(directory) == "finished":  # one of several processes speaks
        print(json.dumps(result(directory)))
