"""January as a whole: config, a killed run, reproduction, the command line, the numbers in the READMEs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.evaluation.runner import read_traces
from common.foundation import published
from common.foundation.compare import compare
from common.foundation.files import read_json, write_json
from common.foundation.months import ROOT, load
from common.foundation.readme import marked_readmes, rendered
from common.foundation.reproduce import reproduce
from common.foundation.run import configure, ensure, official, status


def spine(*words, runs, check=True, **environment):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "common", *words],
        env={**os.environ, "SPINE_RUNS": str(runs), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=check,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished run at size tiny, and the folder it is in."""
    runs = tmp_path_factory.mktemp("runs")
    done = spine("year", "--size", "tiny", "--months", "1", runs=runs)
    return runs, json.loads(done.stdout.splitlines()[-1])


def test_the_script_is_short_and_its_sizes_are_complete():
    module = load("01_spine", "run")
    assert len((ROOT / "01_spine" / "run.py").read_text().splitlines()) <= 150
    for size in ("tiny", "small", "medium", "large"):
        configure(module, size=size)


def test_year_ends_with_one_json_object_and_a_report(tiny):
    runs, outcome = tiny
    summary = outcome["months"]["01_spine"]
    assert summary["claims"][0]["value"]["mean"] < summary["claims"][0]["control"]["mean"]
    assert summary["cost"]["tokens"]["trained"] > 100_000
    page = (runs / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert summary["claims"][0]["text"] in page
    assert "not built yet" in page


def test_an_unchanged_month_is_skipped(tiny):
    runs, outcome = tiny
    again = spine("year", "--size", "tiny", "--months", "1", runs=runs)
    assert json.loads(again.stdout.splitlines()[-1]) == outcome
    assert "not run again" in again.stderr
    assert " -> " not in again.stderr


def test_traces_match_the_summary(tiny):
    _, outcome = tiny
    summary = outcome["months"]["01_spine"]
    traces = read_traces(Path(summary["run"]) / "traces-columns.jsonl")
    right = sum(trace["correct"] is True for trace in traces)
    number = next(row for row in summary["numbers"] if row["name"] == "column by column, unseen sums")
    assert right / len(traces) == number["value"]["mean"]


def stable(directory):
    return read_json(os.path.join(directory, "summary.json"))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("moment", [0.1, 0.45, 0.8])
def test_killed_at_any_moment_and_run_again_it_ends_the_same(tiny, tmp_path, moment):
    _, outcome = tiny
    undisturbed = outcome["months"]["01_spine"]
    command = [sys.executable, "-m", "common", "month", "1", "--size", "tiny"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "SPINE_RUNS": str(tmp_path)},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 900  # on a machine that is busy with other things
    while not list(tmp_path.glob("01_spine/*/manifest.json")):  # it has started
        assert time.time() < deadline
        time.sleep(0.02)
    time.sleep(moment * undisturbed["cost"]["wall_seconds"])
    process.send_signal(signal.SIGKILL)
    process.wait()
    (directory,) = [path for path in (tmp_path / "01_spine").iterdir() if path.is_dir()]
    assert status(directory) in ("interrupted", "finished")
    spine("month", "1", "--size", "tiny", runs=tmp_path)
    assert status(directory) == "finished"
    assert stable(directory) == stable(undisturbed["run"])


def test_reproduce_agrees_to_the_last_digit(tiny, tmp_path):
    _, outcome = tiny
    found = reproduce(Path(outcome["months"]["01_spine"]["run"]), tmp_path)
    assert found.agrees
    assert min(found.digits.values()) >= 12
    assert found.changed_code == []


def test_reproduce_says_which_code_has_changed(tiny, tmp_path):
    _, outcome = tiny
    copy = tmp_path / "copy"
    shutil.copytree(outcome["months"]["01_spine"]["run"], copy)
    manifest = read_json(copy / "manifest.json")
    manifest["code"]["common.model.ngram"] = "older"
    write_json(copy / "manifest.json", manifest)
    assert reproduce(copy, tmp_path / "scratch").changed_code == ["common.model.ngram"]


def test_reproduce_refuses_what_is_not_finished(tmp_path):
    with pytest.raises(ValueError, match="is absent, not finished"):
        reproduce(tmp_path, tmp_path)


def test_the_record_tells_a_better_model_from_a_better_measurement(tiny, monkeypatch):
    runs, outcome = tiny
    monkeypatch.setenv("SPINE_RUNS", str(runs))
    base = outcome["months"]["01_spine"]["run"]
    expected = {"measurement": {"rule": "last_digit"}, "model": {"order": 3}, "both": {"order": 3, "unit": "nats"}}
    for verdict, fields in expected.items():
        assert compare(base, ensure("01_spine", "tiny", **fields)).verdict == verdict
    assert compare(base, ensure("01_spine", "tiny", strategy="ask")).model
    changed = spine("month", "1", "--size", "tiny", "--set", "unit=nats", runs=runs)
    other = json.loads(changed.stdout.splitlines()[-1])["run"]
    said = spine("compare", base, other, "--json", runs=runs).stdout.splitlines()
    assert said[0].startswith("only the measurement changed")
    assert json.loads(said[-1])["measurement"] == {"unit": ["bits", "nats"]}


def test_sample_and_evaluate_use_the_latest_run(tiny):
    runs, _ = tiny
    words = ["sample", "--size", "tiny", "--max-tokens", "20", "--json"]
    first, again = (json.loads(spine(*words, runs=runs).stdout.splitlines()[-1])[0] for _ in range(2))
    assert (first["ids"], first["logprobs"]) == (again["ids"], again["logprobs"])
    assert len(first["ids"]) == 20
    asked = spine("evaluate", "--size", "tiny", "--strategy", "ask", "--n", "50", "--json", runs=runs).stdout
    assert json.loads(asked.splitlines()[-1])["accuracy"]["n"] == 50


def test_doctor_finds_our_model_healthy(tiny):
    runs, _ = tiny
    said = spine("doctor", "--size", "tiny", "--json", runs=runs).stdout
    assert json.loads(said.splitlines()[-1])["healthy"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("month", "1", "--set", "ordre=4"), "write field=value with one of seed, order"),
        (("month", "13"), "month 13 is unknown"),
        (("month", "12"), "has not landed yet"),
        (("assets", "homer"), "it has shakespeare"),
        (("reproduce", "nowhere"), "not finished"),
        (("compare", "nowhere", "elsewhere"), "nowhere is not a finished run (absent)"),
        (("gallery", "12"), "none of them has a gallery yet"),
        (("doctor", "--hf", "nowhere/at/all"), "nowhere/at/all"),
        (("evaluate", "--size", "tiny", "--rule", "best"), "rule 'best' is unknown"),
    ],
)
def test_bad_requests_are_one_clear_sentence(tiny, words, message):
    runs, _ = tiny
    done = spine(*words, runs=runs, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_any_source_the_year_says_so_and_goes_on(tmp_path):
    empty = {
        "SPINE_CACHE": str(tmp_path / "cache"),
        "SPINE_ASSETS": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
    }
    done = spine("year", "--size", "tiny", "--months", "1", runs=tmp_path / "runs", check=False, **empty)
    assert done.returncode == 1
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert "asset 'shakespeare'" in outcome["skipped"]["01_spine"]
    assert "could not be fetched" in (tmp_path / "runs" / "report.html").read_text()


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def close_enough(there, here):
    """Two table rows of a month that trains: the same things, and means within a fifth of each other or of 0.05."""
    there, here = cells(there), cells(here)
    if len(there) != len(here) or there[0] != here[0]:
        return False
    means = [re.search(r"(-?[\d.]+) \[", " ".join(row)) for row in (there, here)]
    if means[0] is None:
        return True
    a, b = (float(found[1]) for found in means)
    return abs(a - b) <= max(0.05, 0.2 * abs(a))


LONG = ("05_pretraining", "06_baselines")  # minutes: their own tests look at the rows of their tables


def test_the_numbers_in_the_readmes_are_those_of_a_run(tmp_path, monkeypatch):
    """The tables are made again from a fresh run at size small.

    To the last digit for January and February, which count. From March on models are trained, and other processors round
    otherwise: there the rows must be the same, and their means close. From May on a run takes minutes.
    """
    monkeypatch.setenv("SPINE_RUNS", str(tmp_path))
    spine("year", "--size", "small", "--months", "1-4", runs=tmp_path)
    assert marked_readmes()
    for path in marked_readmes():
        text = path.read_text(encoding="utf-8")
        for there, here in zip(text.splitlines(), rendered(text, "small", leave=LONG).splitlines(), strict=True):
            trains = (path.parent.name[:2] >= "03" and path.parent.name[:1].isdigit()) or re.match(
                r"(\| )?\[(0[3-9]|1)", there
            )
            if path.parent == ROOT and there.startswith("| [0"):  # a row of the year's table: its run time is a clock's
                there, here = (" | ".join(cells(row)[:3] + cells(row)[4:]) for row in (there, here))
            if any(f"({folder}/" in there for folder in LONG):
                same = cells(there)[:2] == cells(here)[:2]
            else:
                same = there == here or (trains and close_enough(there, here))
            assert same, f"{path}: not current; python -m common report --readme\n{there}\n{here}"
    for folder in ("01_spine", "02_tokenization", "03_attention", "04_blocks"):
        compared, moved = published.departures(folder, read_json(official(folder, "small") / "summary.json"))
        assert compared
        assert not moved, published.sentence(compared, moved)
