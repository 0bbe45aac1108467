"""The gallery is a measurement: healthy code passes, each bug is caught as promised, the matrix is current."""

import dataclasses

import pytest

from common.diagnostics.core import HANDLES, Failure, Reading, probe
from common.diagnostics.gallery import (
    Cell,
    disagreements,
    failures_of,
    kill_matrix,
    merged,
    problems_with,
    read_csv,
    to_csv,
    write_csv,
)
from common.diagnostics.probes import ALL, by_name
from common.foundation.months import MONTHS, built_months


@probe("half", "is the vocabulary at least two?")
def half(vocab_size):
    return Reading(1.0 / vocab_size, 0.5)


def healthy():
    return {"vocab_size": 4}


def entry(**changes):
    fields = {
        "id": "toy/one",
        "month": "01_spine",
        "title": "t",
        "story": "s",
        "symptom": "y",
        "fix": "f",
        "broken": lambda: {"vocab_size": 1},
        "healthy": healthy,
        "probe": "half",
        "source": "x",
    }
    return Failure(**{**fields, **changes})


def test_a_matrix_and_its_problems():
    good = [entry()]
    cells = kill_matrix(good, [half])
    assert [(c.failure, c.verdict) for c in cells] == [("healthy/01_spine", "pass"), ("toy/one", "caught")]
    assert problems_with(cells, good) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"broken": lambda: {"vocab_size": 3}}, "not caught by half"),
        ({"healthy": lambda: {"vocab_size": 1}}, "healthy code raises an alarm"),
        ({"blind_spots": ("half",)}, "is called a blind spot but says caught"),
        ({"probe": None, "survives": "why"}, "said to survive, but half catches it"),
        ({"probe": "other"}, "which does not apply"),
    ],
)
def test_every_broken_promise_is_reported(changes, complaint):
    failures = [entry(**changes)]
    assert any(complaint in line for line in problems_with(kill_matrix(failures, [half]), failures))


def test_a_probe_that_does_not_apply_has_no_row_and_one_that_raises_is_an_alarm():
    @probe("needs-model", "?")
    def needs_model(model):
        return Reading(0.0, 0.0)

    @probe("raises", "?")
    def raises(vocab_size):
        raise KeyError("boom")

    cells = kill_matrix([entry()], [needs_model, raises])
    assert {(c.probe, c.verdict) for c in cells} == {("raises", "false alarm"), ("raises", "caught")}


def test_nan_is_caught():
    assert Reading(float("nan"), 1.0).caught


def test_a_probe_with_an_unknown_handle_is_refused():
    with pytest.raises(ValueError, match="not in HANDLES"):

        @probe("x", "?")
        def wrong(modle):
            return Reading(0, 0)


def test_an_entry_names_a_probe_or_says_why_not():
    with pytest.raises(ValueError, match="name a probe"):
        entry(probe=None)
    with pytest.raises(ValueError, match="not both"):
        entry(survives="why")


def test_csv_round_trip_and_merge(tmp_path):
    path = tmp_path / "gallery.csv"
    cells = kill_matrix([entry()], [half])
    write_csv(cells, path)
    assert [dataclasses.replace(c, cpu_seconds=0, note="") for c in cells] == [
        dataclasses.replace(c, cpu_seconds=0) for c in read_csv(path)
    ]
    other = Cell("toy/two", "02_tokenization", "half", "caught", 1, 0.5, 0)
    assert [c.failure for c in merged([other], path)] == ["healthy/01_spine", "toy/one", "toy/two"]
    changed = [dataclasses.replace(cells[1], verdict="silent")]
    assert disagreements(changed, read_csv(path)) == [
        "toy/one × half: committed caught, measured silent",
        "healthy/01_spine × half: committed pass, measured nothing",
    ]
    path.write_text(to_csv(cells).replace("0.5,", "much,", 1))
    with pytest.raises(ValueError, match="line 2"):
        read_csv(path)


@pytest.mark.parametrize("month", [m.folder for m in built_months()])
def test_each_month_has_entries_that_are_complete(month):
    failures = failures_of([m for m in MONTHS if m.folder == month])
    assert len(failures) >= 8
    for failure in failures:
        assert failure.month == month
        assert all((failure.title, failure.story, failure.symptom, failure.fix, failure.source)), failure.id
        if failure.probe:
            by_name(failure.probe)
        assert len(failure.blind_spots) >= 1 or failure.survives, failure.id


def test_probes_ask_a_question_and_use_documented_handles():
    assert len({p.name for p in ALL}) == len(ALL)
    for one in ALL:
        assert one.question.endswith("?"), one.name
        assert one.measure.__doc__, one.name
        assert set(one.needs) <= set(HANDLES)
    with pytest.raises(ValueError, match="is unknown"):
        by_name("nope")


def test_the_committed_matrix_has_every_entry():
    committed = {(cell.failure, cell.probe): cell.verdict for cell in read_csv()}
    for failure in failures_of(built_months()):
        if failure.probe:
            assert committed[failure.id, failure.probe] == "caught"


TRAINED = (
    "overfit-one-batch",
    "entropy-floor",
    "loss-falls",
    "known-entropy",
    "beats-unigram",
    "own-text",
    "samples-look-right",
)


def test_no_verdict_that_a_training_decides_hangs_by_a_hair():
    """Another processor moves what a training ends with: a reading needs a distance from its threshold, or from zero."""
    for cell in read_csv():
        if cell.probe in TRAINED and cell.month >= "03":  # before March, models count
            assert abs(cell.value - cell.threshold) > max(0.05, 0.1 * cell.threshold), cell
