"""May as a whole: its run at size tiny, killed and resumed, planned, and sampled from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.foundation import trainings
from common.foundation.files import read_json, read_json_lines
from common.foundation.months import ROOT, load
from common.foundation.run import configure, run_directory, status
from common.studies.base import RECIPE_NAME
from common.training.checkpoint import load_with_tokenizer

COMMAND = [sys.executable, "-m", "common", "month", "5", "--size", "tiny"]


def environment(runs):
    return {**os.environ, "SPINE_RUNS": str(runs)}


@pytest.fixture(scope="module")
def tiny(tiny_year):
    """(runs folder, directory, summary) of the finished run at size tiny."""
    done = subprocess.run(COMMAND, env=environment(tiny_year), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    return tiny_year, Path(summary["run"]), summary


def test_the_script_is_short_and_its_sizes_are_complete():
    module = load("05_pretraining", "run")
    assert len((ROOT / "05_pretraining" / "run.py").read_text().splitlines()) <= 150
    for size in ("tiny", "small", "medium", "large"):
        configure(module, size=size)


def test_a_tiny_run_finishes_claims_nothing_and_leaves_a_model(tiny):
    _, directory, summary = tiny
    assert status(directory) == "finished"
    assert summary["claims"] == []
    assert summary["cost"]["tokens"]["trained"] > 10_000
    assert summary["cost"]["flops"] > 0
    model, tokenizer = load_with_tokenizer(directory / "model")
    assert model.vocab_size == tokenizer.vocab_size == 512
    rows = read_json_lines(directory / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert {row["step"] for row in rows} >= set(range(1, len(losses) + 1))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_in_the_training_and_run_again_it_ends_with_the_same_model(tiny, tmp_path):
    _, undisturbed, _ = tiny
    process = subprocess.Popen(
        COMMAND, env=environment(tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    snapshots, deadline = tmp_path / "05_pretraining" / undisturbed.name / "snapshots", time.time() + 1800
    while not list(snapshots.glob("step-*")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(COMMAND, env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    resumed = tmp_path / "05_pretraining" / undisturbed.name
    assert read_json(resumed / "manifest.json")["attempts"] == 2
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_plan_is_printed_and_nothing_is_trained(tiny):
    runs, _, _ = tiny
    words = [sys.executable, "05_pretraining/run.py", "--size", "tiny", "--plan"]
    done = subprocess.run(words, env=environment(runs), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("parameters", "tokens", "FLOP", "MiB", "hours"):
        assert word in done.stderr
    assert "Pretraining" not in done.stdout


def test_text_is_streamed_from_the_trained_model(tiny):
    runs, _, _ = tiny
    words = [
        sys.executable,
        "-m",
        "common",
        "sample",
        "--month",
        "05",
        "--size",
        "tiny",
        "--max-tokens",
        "12",
        "ROMEO:",
    ]
    done = subprocess.run(words, env=environment(runs), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ROMEO:")
    assert len(done.stdout) > len("ROMEO:\n")


def test_the_table_in_the_article_has_the_rows_of_a_run(tiny):
    """Its numbers take minutes to make again, and `python -m common report --readme` writes them; here only their names."""
    _, _, summary = tiny
    text = (ROOT / "05_pretraining" / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- numbers:05_pretraining -->")[1].split("<!-- /numbers")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == [row["name"] for row in summary["numbers"]]
    config = configure(load("05_pretraining", "run"), size="small")
    assert f"config `{run_directory('05_pretraining', config).name}`" in table


def test_every_committed_training_of_the_recipe_learned_to_add_long_before_its_end():
    mine = trainings.of(trainings.read(), RECIPE_NAME)
    assert len({record["seed"] for record in mine}) >= 3
    assert {record["format"] for record in mine} == {"float32", "bfloat16"}
    for record in mine:
        assert trainings.transition(record) <= 0.5, trainings.key(record)
        assert record["drills"][-1][1] >= 0.9, trainings.key(record)


def test_two_seeds_of_three_can_do_what_later_months_build_on_and_the_article_says_that_one_cannot():
    mine = trainings.of(trainings.read(), RECIPE_NAME)
    able = {
        record["seed"]
        for record in mine
        if record["right"]["sums of 3"] >= 0.9
        and 0.5 <= record["right"]["sums of 5"] <= 0.9  # something is left to improve
        and min(record["right"]["checksum of 6"], record["right"]["mod_chain of 6"]) >= 0.7
    }
    assert able == {0, 2}
    assert "With seed 1, in both formats" in (ROOT / "05_pretraining" / "README.md").read_text(encoding="utf-8")
