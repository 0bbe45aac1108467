"""Runs: what is on disk after success, crash and kill, and who may call it finished."""

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
import types

import pytest

from common.foundation.files import read_json, set_aside, write_json
from common.foundation.run import Run, ensure, latest, needed, result, status


@dataclasses.dataclass(frozen=True)
class Config:
    size: str = "tiny"
    seed: int = 0
    width: int = 8


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("SPINE_RUNS", str(tmp_path))
    return tmp_path


def finished(config=Config(), summary=None):
    with Run("01_spine", config) as run:
        run.log(step=1, loss=2.5)
        run.path("note.txt").write_text("kept")
        run.spend(flops=10, trained=5)
        run.spend(flops=1, trained=2, generated=3)
        run.identify(tokenizer="t", model={"w": "1"}, measurement={"rule": "whole"})
        run.finish(summary or {"accuracy": 0.5})
    return run.directory


def test_a_finished_run_has_its_record(scratch):
    directory = finished()
    assert directory.parent == scratch / "01_spine"
    assert directory.name.startswith("tiny-")
    manifest = read_json(directory / "manifest.json")
    assert manifest["status"] == "finished"
    assert manifest["config"] == {"size": "tiny", "seed": 0, "width": 8}
    assert manifest["tokens"] == {"trained": 7, "generated": 3}
    assert manifest["flops"] == 11
    for key in ("seed", "inputs", "tokenizer", "git", "packages", "machine", "wall_seconds", "cpu_seconds", "code"):
        assert key in manifest, key
    assert set(manifest["artifacts"]) == {"metrics.jsonl", "note.txt", "summary.json"}
    assert status(directory) == "finished"
    assert json.loads((directory / "metrics.jsonl").read_text()) == {"loss": 2.5, "step": 1}
    assert result(directory)["cost"]["flops"] == 11


def test_a_crashed_run_says_so_and_never_looks_finished():
    with pytest.raises(ZeroDivisionError), Run("01_spine", Config()) as run:
        run.finish({"accuracy": 1.0})
        _ = 1 / 0
    assert status(run.directory) == "crashed"
    assert "ZeroDivisionError" in read_json(run.directory / "manifest.json")["error"]
    assert not (run.directory / "summary.json").exists()
    assert latest("01_spine", "tiny") is None


def test_a_run_without_a_summary_is_a_crash():
    with pytest.raises(RuntimeError, match="without run.finish"), Run("01_spine", Config()) as run:
        pass
    assert status(run.directory) == "crashed"


def test_nan_in_a_summary_is_a_crash_not_a_finished_run():
    with pytest.raises(ValueError, match="JSON compliant"), Run("01_spine", Config()) as run:
        run.finish({"loss": float("nan")})
    assert status(run.directory) == "crashed"


@pytest.mark.parametrize("name", ["summary.json", "note.txt"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_artifact_is_noticed(name, damage):
    directory = finished()
    path = directory / name
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-2])
    assert status(directory) == "damaged"
    assert latest("01_spine", "tiny") is None


def test_latest_is_the_newest_finished_one():
    assert latest("01_spine", "tiny") is None
    with pytest.raises(FileNotFoundError, match="python -m common month 1 --size tiny"):
        needed("01_spine", "tiny")  # of the month's own config, which nobody ran
    finished(Config(width=1))
    second = finished(Config(width=2))
    with pytest.raises(RuntimeError), Run("01_spine", Config(width=3)):
        raise RuntimeError
    assert latest("01_spine", "tiny") == second
    assert latest("01_spine", "small") is None


def test_an_interrupted_run_is_resumed_with_its_files_only_if_nothing_changed():
    with pytest.raises(RuntimeError), Run("01_spine", Config()) as run:
        run.path("traces.jsonl").write_text("half the work")
        run.log(step=1)
        raise RuntimeError
    with Run("01_spine", Config()) as again:
        assert again.resumed
        assert again.path("traces.jsonl").exists()
        assert not again.path("metrics.jsonl").exists(), "the log is written anew"
        assert again.manifest["attempts"] == 2
        again.finish({})
    with Run("01_spine", Config()) as third:
        assert not third.resumed, "a finished run is not resumed but set aside"
        assert not third.path("traces.jsonl").exists()
        third.finish({})
    assert (again.directory.with_name(again.directory.name + ".1") / "traces.jsonl").exists()


def test_other_code_does_not_resume():
    with pytest.raises(RuntimeError), Run("01_spine", Config()) as run:
        raise RuntimeError
    manifest = read_json(run.directory / "manifest.json")
    write_json(run.directory / "manifest.json", {**manifest, "content_key": "older code"})
    with Run("01_spine", Config()) as again:
        assert not again.resumed
        again.finish({})


def test_two_writers_of_one_directory_are_refused():
    with Run("01_spine", Config()) as run:
        with pytest.raises(RuntimeError, match="being written by another process"), Run("01_spine", Config()):
            pass
        run.finish({})
    assert status(run.directory) == "finished"


def _sleep_in_a_run(root, started):
    os.environ["SPINE_RUNS"] = root
    with Run("01_spine", Config()) as run:
        run.path("artifact").write_text("x")
        started.set()
        time.sleep(3600)  # it is killed


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_reads_as_interrupted(scratch):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_sleep_in_a_run, args=(str(scratch), started))
    process.start()
    assert started.wait(900)
    (directory,) = [path for path in (scratch / "01_spine").iterdir() if path.is_dir()]
    assert status(directory) == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert status(directory) == "interrupted"
    assert latest("01_spine", "tiny") is None
    with Run("01_spine", Config()) as again:
        assert again.resumed
        again.finish({})


def test_cost_is_measured_and_a_crashed_attempt_counts():
    with pytest.raises(RuntimeError), Run("01_spine", Config()) as run:
        time.sleep(0.2)
        raise RuntimeError
    with Run("01_spine", Config()) as again:
        time.sleep(0.1)
        again.finish({})
    assert read_json(run.directory / "manifest.json")["wall_seconds"] >= 0.3


def test_a_damaged_manifest_is_damaged_and_hides_no_other_run():
    good, bad = finished(Config(width=1)), finished(Config(width=2))
    (bad / "manifest.json").write_text("{")
    assert status(bad) == "damaged"
    assert latest("01_spine", "tiny") == good


def test_another_process_with_the_same_number_is_not_the_writer():
    with pytest.raises(RuntimeError), Run("01_spine", Config()) as run:
        raise RuntimeError
    manifest = read_json(run.directory / "manifest.json")
    process = {**manifest["process"], "started": 1.0}
    write_json(run.directory / "manifest.json", {**manifest, "status": "running", "process": process})
    assert status(run.directory) == "interrupted"


@pytest.fixture
def toy_month(monkeypatch):
    """A month whose run takes no time, in the place of January's."""
    module = types.SimpleNamespace(Config=Config, SIZES={"tiny": {}}, INPUTS=("text",), runs=0, text="v1")

    def main(config):
        with Run("01_spine", config, inputs=module.INPUTS) as run:
            module.runs += 1
            run.finish({"width": config.width})

    module.main = main
    monkeypatch.setattr("common.foundation.run.load", lambda folder, file: module)
    monkeypatch.setattr("common.foundation.assets.pinned_hash", lambda name: module.text)
    return module


def test_ensure_runs_again_only_if_something_changed(toy_month, monkeypatch):
    first = ensure("01_spine", "tiny")
    assert (ensure("01_spine", "tiny"), toy_month.runs) == (first, 1)
    toy_month.text = "v2"
    ensure("01_spine", "tiny")
    assert toy_month.runs == 2, "an input changed"
    monkeypatch.setattr("common.foundation.run.code_hashes", lambda path: {"run.py": "other"})
    ensure("01_spine", "tiny")
    assert toy_month.runs == 3, "the code changed"
    ensure("01_spine", "tiny", force=True)
    assert toy_month.runs == 4
    assert ensure("01_spine", "tiny", width=9) != first
    assert needed("01_spine", "tiny") == first, "an override is not the official run"
    assert (
        len([path for path in first.parent.iterdir() if path.name.startswith(first.name + ".")]) == 4
    )  # 3 old, 1 lock


def test_force_does_not_take_the_folder_from_a_running_run(toy_month):
    with Run("01_spine", Config()) as run:
        run.path("work").write_text("in progress")
        with pytest.raises(RuntimeError, match="being written"):
            ensure("01_spine", "tiny", force=True)
        assert run.path("work").exists()
        run.finish({})


def test_set_aside_runs_are_not_latest():
    directory = finished()
    set_aside(directory)
    assert latest("01_spine", "tiny") is None
