"""March and April as a whole: their runs at size tiny, and what they leave on record."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.foundation.files import read_json
from common.foundation.months import ROOT, load
from common.foundation.run import configure, status

FOLDERS = ("03_attention", "04_blocks")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder -> (directory of the finished run at size tiny, its summary). March makes February first."""
    runs = tmp_path_factory.mktemp("runs")
    made = {}
    for folder in FOLDERS:
        words = [sys.executable, "-m", "common", "month", folder[:2], "--size", "tiny"]
        environment = {**os.environ, "SPINE_RUNS": str(runs)}
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout.splitlines()[-1])
        made[folder] = Path(summary["run"]), summary
    return made


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_script_is_short_and_its_sizes_are_complete(folder):
    module = load(folder, "run")
    assert len((ROOT / folder / "run.py").read_text().splitlines()) <= 150
    for size in ("tiny", "small", "medium", "large"):
        configure(module, size=size)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_tiny_run_finishes_and_claims_nothing(tiny, folder):
    directory, summary = tiny[folder]
    assert status(directory) == "finished"
    assert summary["claims"] == []
    assert all((directory / figure["file"]).exists() and figure["alt"] for figure in summary["figures"])
    manifest = read_json(directory / "manifest.json")
    assert manifest["tokens"]["trained"] > 0


def test_march_has_every_kind_of_order_at_every_length_that_it_allows(tiny):
    names = [row["name"] for row in tiny["03_attention"][1]["numbers"]]
    for kind in ("none", "learned", "sinusoidal", "alibi", "rope"):
        lengths = (32, 64) if kind == "learned" else (32, 64, 128)
        assert [f"order by {kind}, {n} tokens" for n in lengths] == [
            n for n in names if n.startswith(f"order by {kind},")
        ]
    assert sum(name.startswith("look-up, silenced") for name in names) == 3


def test_april_has_every_part_with_an_interval_over_seeds(tiny):
    from common.studies import depth

    rows = {row["name"]: row for row in tiny["04_blocks"][1]["numbers"]}
    for name in depth.PARTS:
        value = rows[f"part, {name}"]["value"]
        assert value["n"] == 2
        assert value["method"] == "student"
        assert value["low"] <= value["mean"] <= value["high"]
        assert math.isfinite(value["mean"])
    assert rows["gpt2: cache"]["value"] == 36_864  # 12 layers, keys and values of 768 numbers, two bytes each
