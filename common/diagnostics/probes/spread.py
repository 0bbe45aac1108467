"""A probe of what is printed beside a result: does it speak for the next training, or only for the next questions?"""

from collections.abc import Callable

from common.diagnostics.core import Reading, probe


@probe("spread-over-trainings", "do further trainings end within the interval that is printed?")
def spread_over_trainings(
    trained_rate: Callable, printed_interval: Callable, *, trainings: int = 12, first_seed: int = 100
) -> Reading:
    """Train with further seeds and count how many end outside.

    The range of six trainings leaves out two of seven further ones on average; an interval over questions leaves out
    whatever the seed changes. The limit lies between: half of them.
    """
    low, high = printed_interval()
    rates = [trained_rate(seed) for seed in range(first_seed, first_seed + trainings)]
    outside = sum(not low <= rate <= high for rate in rates)
    note = f"printed [{low:.3f}, {high:.3f}], {trainings} trainings from {min(rates):.3f} to {max(rates):.3f}"
    return Reading(outside / trainings, 0.5, note)
