"""Our three formulas against scipy and statsmodels, and against their own meaning."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from common.foundation.statistics import mean_ci, mean_of_seeds, paired_difference, pass_at_k


@given(st.integers(1, 400), st.data())
def test_wilson_equals_statsmodels(n, data):
    k = data.draw(st.integers(0, n))
    found = mean_ci([1.0] * k + [0.0] * (n - k))
    low, high = proportion_confint(k, n, method="wilson")
    assert found.method == "wilson"
    assert found.low == pytest.approx(max(0, low), abs=1e-12)
    assert found.high == pytest.approx(min(1, high), abs=1e-12)
    assert found.low <= found.mean <= found.high


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=80)
    found = mean_ci(values)
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    width = other.high - other.low
    assert found.low == pytest.approx(other.low, abs=0.05 * width)
    assert found.high == pytest.approx(other.high, abs=0.05 * width)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        found = mean_ci(rng.normal(5.0, 2.0, size=60), resamples=1000)
        hits += found.low <= 5.0 <= found.high
    assert 0.90 <= hits / 300 <= 0.985


def test_weighted_mean_is_the_ratio_of_totals():
    nats, sizes = np.array([30.0, 2.0, 50.0]), np.array([20.0, 1.0, 45.0])
    assert mean_ci(nats / sizes, weights=sizes).mean == pytest.approx(82.0 / 66.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_equals_statsmodels(pairs):
    a, b = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    found = paired_difference(a, b, resamples=50)
    table = [[np.sum((a == x) & (b == y)) for y in (1, 0)] for x in (1, 0)]
    assert found.p_value == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)
    assert found.difference == pytest.approx(a.mean() - b.mean())


def test_paired_interval_of_zeros_and_ones_covers_the_truth_and_is_never_empty():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        draw = rng.choice(4, size=50, p=[0.5, 0.2, 0.05, 0.25])  # both, only a, only b, neither
        found = paired_difference(draw <= 1, (draw == 0) | (draw == 2))
        hits += found.low <= 0.15 <= found.high
    assert 0.92 <= hits / 400 <= 0.99
    all_better = paired_difference([1.0] * 30, [0.0] * 30)
    assert 0.8 < all_better.low < all_better.high == 1.0, "thirty of thirty is not certainty"


def test_paired_interval_is_close_to_the_bootstrap_where_there_is_plenty():
    rng = np.random.default_rng(1)
    a, b = (rng.random(2000) < 0.6).astype(float), (rng.random(2000) < 0.5).astype(float)
    exact, resampled = paired_difference(a, b), paired_difference(a, b, weights=np.ones(2000))
    assert (exact.low, exact.high) == pytest.approx((resampled.low, resampled.high), abs=2e-3)


def test_pairing_sees_what_separate_intervals_miss():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, size=200)
    a, b = difficulty + 0.5 + rng.normal(0, 1, 200), difficulty + rng.normal(0, 1, 200)
    assert mean_ci(a).low < mean_ci(b).high, "separate intervals overlap"
    assert paired_difference(a, b).low > 0


def test_paired_without_zeros_and_ones_has_no_mcnemar():
    found = paired_difference([0.5, 1.0], [0.0, 1.0])
    assert found.p_value is None
    assert found.only_a is None


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 2), (6, 6), (8, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(n, c):
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("arguments", [(5, 6, 1), (5, 2, 6), (5, -1, 1), (0, 0, 0)])
def test_pass_at_k_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError, match="need 0 <= correct"):
        pass_at_k(*arguments)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="index 1"):
        mean_ci([0.0, float("nan")])
    with pytest.raises(ValueError, match="at least one"):
        mean_ci([])
    with pytest.raises(ValueError, match="2 in a, 1 in b"):
        paired_difference([1, 0], [1])
    with pytest.raises(ValueError, match="need 2 weights"):
        mean_ci([1.0, 0.5], weights=[1.0])


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0]])
def test_impossible_weights_are_refused_in_both(weights):
    with pytest.raises(ValueError, match="weights"):
        mean_ci([1.0, 2.0, 3.0], weights=weights)
    with pytest.raises(ValueError, match="weights"):
        paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], weights=weights)


def test_weights_matter_in_a_paired_difference():
    assert paired_difference([1.0, 0.0], [0.0, 0.5], weights=[3.0, 1.0]).difference == pytest.approx(2.5 / 4)


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least two"):
        mean_ci([2.26])


def test_same_seed_same_interval():
    values = np.random.default_rng(0).random(30)
    assert mean_ci(values) == mean_ci(values)


def test_a_mean_of_seeds_has_the_interval_of_student():
    found = mean_of_seeds([3.0, 3.2, 3.1])
    assert (found.mean, found.n) == (pytest.approx(3.1), 3)
    assert found.high - found.mean == pytest.approx(
        4.302653 * 0.1 / math.sqrt(3), rel=1e-6
    )  # the table's t for 2 degrees
    with pytest.raises(ValueError, match="at least two seeds"):
        mean_of_seeds([1.0])
