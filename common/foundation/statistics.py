"""The noise bar: an interval on every number, and paired tests where the same problems are answered twice.

Three functions, no distribution tables: a mean with its interval, the difference of two systems on the same items,
and the unbiased pass@k. Tests compare them with scipy and statsmodels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over `n` items with a two-sided confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    n: int
    method: str

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, float | int | str]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n, "method": self.method}


@dataclass(frozen=True)
class PairedDifference:
    """mean(a) - mean(b) over the same items, with a paired interval.

    For zero-one values `only_a` and `only_b` count the items that just one of the two got right, and `p_value` is the
    exact McNemar test on them; otherwise they are None and the interval speaks alone.
    """

    difference: float
    low: float
    high: float
    n: int
    only_a: int | None = None
    only_b: int | None = None
    p_value: float | None = None

    def as_dict(self) -> dict[str, float | int]:
        return {"mean": self.difference, "low": self.low, "high": self.high, "n": self.n}

    def __str__(self) -> str:
        text = f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return text if self.p_value is None else f"{text}, McNemar p = {self.p_value:.2g}"


def _values(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a list of at least one number, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinity at index {int(np.flatnonzero(~np.isfinite(array))[0])}")
    return array


def _weights(weights: Sequence[float] | None, n: int) -> np.ndarray:
    weight = np.ones(n) if weights is None else _values("weights", weights)
    if len(weight) != n or (weight < 0).any() or weight.sum() == 0:
        raise ValueError(f"{n} values need {n} weights, none negative and not all zero; got {len(weight)}")
    return weight


def mean_ci(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of independent items with its confidence interval.

    Zeros and ones (without weights) get the Wilson score interval (Wilson 1927), which keeps its coverage near 0 and
    1 where the usual "plus or minus two standard errors" collapses to zero width. Anything else gets the percentile
    bootstrap (Efron 1979). `weights` makes it a weighted mean, resampled item by item: with values = bits per byte of
    each scene and weights = bytes of each scene, it is the bits per byte of the whole text.

    The items must be independent: resample scenes, not the bytes inside them. Where items come in groups (scenes of a
    play), the interval speaks for these groups; what another group would give can differ by more.

    >>> print(mean_ci([1] * 8 + [0] * 2))    # 8 of 10 right says little
    0.800 [0.490, 0.943]
    >>> print(mean_ci([1] * 10))             # 10 of 10 is not certainty
    1.000 [0.722, 1.000]
    """
    array = _values("values", values)
    n = len(array)
    if weights is None and np.isin(array, (0.0, 1.0)).all():
        z = NormalDist().inv_cdf(0.5 + confidence / 2)
        p = float(array.mean())
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n, "wilson")
    if n == 1:
        raise ValueError("one value has no interval: give at least two independent items")
    weight = _weights(weights, n)
    means = _resampled_means(array * weight, weight, resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float((array * weight).sum() / weight.sum()), float(low), float(high), n, "bootstrap")


def _resampled_means(numerator: np.ndarray, denominator: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """`resamples` values of sum(numerator) / sum(denominator), items drawn with replacement."""
    rng = np.random.default_rng(seed)
    n = len(numerator)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // n)  # indices held in memory at once
    for start in range(0, resamples, step):
        index = rng.integers(0, n, size=(min(step, resamples - start), n))
        bottom = denominator[index].sum(axis=1)
        means[start : start + step] = numerator[index].sum(axis=1) / np.where(bottom == 0, 1, bottom)
    return means


def mean_of_seeds(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean over a few trainings with Student's t interval: with three seeds a bootstrap is far too narrow.

    >>> print(mean_of_seeds([1.0, 1.1, 1.2]))
    1.100 [0.852, 1.348]
    """
    from scipy.stats import t as student  # here, because it takes a second to import

    array = _values("values", values)
    if len(array) < 2:
        raise ValueError("one training says nothing about another: give at least two seeds")
    error = float(array.std(ddof=1)) / math.sqrt(len(array))
    reach = float(student.ppf(0.5 + confidence / 2, len(array) - 1)) * error
    mean = float(array.mean())
    return Interval(mean, mean - reach, mean + reach, len(array), "student")


def departs(value: float, published: Sequence[float], *, confidence: float = 0.99, least: float = 0.01) -> bool:
    """Whether the number of one more training lies where those of `published` say that it will not.

    The prediction interval of one further value from a normal distribution: wider than that of the mean, because the new
    training has a spread of its own. Where the trainings agree closely, `least` of their mean is allowed.

    >>> departs(0.9, [0.7, 0.8, 0.75]), departs(0.1, [0.7, 0.8, 0.75])
    (False, True)
    """
    from scipy.stats import t as student

    array = _values("published", published)
    if len(array) < 2:
        raise ValueError("one training says nothing about another: give at least two")
    reach = (
        float(student.ppf(0.5 + confidence / 2, len(array) - 1))
        * float(array.std(ddof=1))
        * math.sqrt(1 + 1 / len(array))
    )
    return not abs(value - float(array.mean())) <= max(reach, least * abs(float(array.mean())))


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """How much better `a` is than `b`, item by item on the same items.

    Pairing removes what makes items easy or hard for both, so that small differences become visible: two separate
    intervals may overlap while the paired one excludes zero. The interval is the paired bootstrap; for zero-one values
    it is that of Bonett and Price (2012), which does not shrink to nothing when all items agree. The p-value is the
    exact McNemar test (1947): under the null, each item that only one of the two got right is a fair coin.

    >>> a = [1] * 60 + [1] * 12 + [0] * 2 + [0] * 26     # 12 items only a, 2 only b
    >>> b = [1] * 60 + [0] * 12 + [1] * 2 + [0] * 26
    >>> print(paired_difference(a, b))
    +0.100 [+0.024, +0.173], McNemar p = 0.013
    """
    first, second = _values("a", a), _values("b", b)
    if len(first) != len(second):
        raise ValueError(f"paired values must belong to the same items: {len(first)} in a, {len(second)} in b")
    weight = _weights(weights, len(first))
    gap, n = first - second, len(first)
    difference = float((gap * weight).sum() / weight.sum())
    if weights is not None or not np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        means = _resampled_means(gap * weight, weight, resamples, seed)
        low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
        return PairedDifference(difference, float(low), float(high), n)
    only_a, only_b = int((gap > 0).sum()), int((gap < 0).sum())
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p_a, p_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = z * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / (n + 2))
    low, high = max(-1.0, min(difference, p_a - p_b - half)), min(1.0, max(difference, p_a - p_b + half))
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    p_value = min(1.0, 2 * tail / 2**discordant)
    return PairedDifference(difference, low, high, n, only_a, only_b, p_value)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that at least one of `k` samples is right, estimated without bias (Chen et al. 2021).

    1 - C(samples - correct, k) / C(samples, k): the share of k-subsets that contain a correct sample. Plugging the
    observed rate into 1 - (1 - p)**k instead is biased low.

    >>> round(pass_at_k(samples=10, correct=3, k=1), 3), round(pass_at_k(samples=10, correct=3, k=5), 3)
    (0.3, 0.917)
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"need 0 <= correct <= samples and 1 <= k <= samples; got {correct=}, {samples=}, {k=}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
