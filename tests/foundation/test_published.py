"""A fresh year against the published numbers: what may move, by how much, and that a departure is found."""

import pytest

from common.foundation import published
from common.foundation.published import departure, departures
from common.foundation.statistics import departs


def rows(**values):
    return {"numbers": [{"name": name, "value": value, "unit": "", "note": ""} for name, value in values.items()]}


def test_a_number_that_no_training_decides_is_the_same_everywhere():
    assert not departure(2.26071, 2.2607, trained=False)
    assert departure(2.2617, 2.2607, trained=False)
    assert departure(41, 40, trained=True)  # a count


def test_a_trained_number_may_lie_where_one_more_training_would():
    six = [0.70, 0.75, 0.66, 0.81, 0.72, 0.69]
    assert not departure(0.62, 0.7, trained=True, trainings=six)
    for elsewhere in (0.03, 1.0):
        assert "6 trainings" in departure(elsewhere, 0.7, trained=True, trainings=six)
    interval = {"mean": 0.9, "low": 0.5, "high": 1.0, "n": 3}
    assert not departure({"mean": 0.55, "low": 0.4, "high": 0.6, "n": 3}, interval, trained=True)
    assert departure({"mean": 0.4, "low": 0.3, "high": 0.5, "n": 3}, interval, trained=True)
    assert departure(float("nan"), 0.5, trained=True)


def test_where_trainings_agree_closely_a_hundredth_of_the_number_is_allowed():
    assert not departs(2.17, [2.16, 2.16, 2.16])
    assert departs(2.20, [2.16, 2.16, 2.16])
    with pytest.raises(ValueError, match="at least two"):
        departs(1.0, [1.0])


def test_months_are_written_and_held_against_what_was_written(tmp_path):
    path = tmp_path / "published.json"
    published.write({"01_spine": rows(a=1.2345678, b=3)}, path)
    published.write({"05_pretraining": rows(sums={"mean": 0.9, "low": 0.85, "high": 0.95, "n": 200})}, path)
    assert departures("01_spine", rows(a=1.2345678, b=3), path=path) == (2, [])
    compared, found = departures("01_spine", rows(a=1.24, c=1), path=path)
    assert compared == 2
    assert [(one.name, one.why) for one in found] == [
        ("a", "a number that no training decides"),
        ("b", "the row is gone"),
        ("c", "the row is new"),
    ]
    fresh = rows(sums={"mean": 0.03, "low": 0.0, "high": 0.1, "n": 200})
    (found,) = departures("05_pretraining", fresh, spreads={"sums": [0.9, 0.95, 0.92]}, path=path)[1]
    assert "sums: 0.03, published 0.9" in published.sentence(1, [found])
    assert departures("06_baselines", fresh, path=path) == (0, [])


def test_a_clock_is_compared_with_nothing(tmp_path):
    path = tmp_path / "published.json"
    summary = rows(seconds=1.0)
    summary["numbers"][0]["clock"] = True
    published.write({"01_spine": summary}, path)
    summary["numbers"][0]["value"] = 9.0
    assert departures("01_spine", summary, path=path) == (0, [])
