import json

import pytest

from common.foundation.evidence import ClaimFailed, claim, number
from common.foundation.statistics import mean_ci, paired_difference


def test_a_claim_that_holds_prints_value_control_and_cost(capsys):
    made = claim("adds", mean_ci([1.0] * 50), mean_ci([0.0] * 50), unit="accuracy", cost={"tokens": 1200})
    text = capsys.readouterr().out
    assert "1.000 [0.929, 1.000] accuracy" in text
    assert "1,200 tokens" in text
    assert "holds" in text
    json.dumps(made, allow_nan=False)


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_touching_intervals_fail_either_way(better):
    with pytest.raises(ClaimFailed):
        claim("better", mean_ci([1.0, 0.0] * 20), mean_ci([1.0, 0.0, 0.0] * 14), better=better)


def test_equal_is_not_better():
    with pytest.raises(ClaimFailed):
        claim("more", 3.0, 3.0)
    with pytest.raises(ClaimFailed):
        claim("less", 3.0, 3.0, better="lower")


def test_direction_matters():
    low, high = mean_ci([0.1, 0.2] * 9), mean_ci([0.8, 0.9] * 9)
    claim("lower", low, high, better="lower")
    with pytest.raises(ClaimFailed):
        claim("higher", low, high, better="higher")


def test_paired_difference_against_zero():
    with pytest.raises(ClaimFailed):
        claim("no gain", paired_difference([1, 0, 1, 0], [0, 1, 1, 0]))


def test_number_keeps_interval():
    assert number("a", mean_ci([1.0, 1.0]), "accuracy")["value"]["n"] == 2
    assert number("b", 3.0, "nats")["value"] == 3.0
