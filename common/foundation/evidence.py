"""A claim is code: it prints value, control, interval and cost, and raises if it does not hold."""

from collections.abc import Mapping
from typing import Any, Literal

from common.foundation.statistics import Interval, PairedDifference


class ClaimFailed(AssertionError):
    """The evidence does not support the claim."""


def claim(
    text: str,
    value: Interval | PairedDifference | float,
    control: Interval | float = 0.0,
    *,
    better: Literal["higher", "lower"] = "higher",
    unit: str = "",
    cost: Mapping[str, Any] | None = None,
    clock: bool = False,
) -> dict[str, Any]:
    """State a claim and check it: the whole interval of `value` must lie on the better side of that of `control`.

    Args:
        text: the sentence that is claimed.
        value: the measured number. A bare float is exact (a count, an invariant) and has no interval.
        control: what the number is with the mechanism switched off, shuffled or random.
        cost: what the value cost, such as {"tokens": 120_000}; deterministic numbers only, they are printed.
        clock: the value was read off a clock.
    Returns:
        The claim as plain JSON values, for a summary.
    Raises:
        ClaimFailed: the intervals touch, or lie the wrong way round.
    """
    low, high = _ends(value)
    control_low, control_high = _ends(control)
    holds = low > control_high if better == "higher" else high < control_low
    unit_text = f" {unit}" if unit else ""
    print(f"claim    {text}")
    print(f"value    {_show(value)}{unit_text}")
    print(f"control  {_show(control)}{unit_text}")
    if cost:
        print("cost     " + ", ".join(f"{_show(amount)} {name}" for name, amount in cost.items()))
    print(f"verdict  {'holds' if holds else 'FAILS'}: {better} is better")
    if not holds:
        raise ClaimFailed(f"{text}: value {_show(value)}, control {_show(control)}, {better} is better")
    return {
        "text": text,
        "value": _plain(value),
        "control": _plain(control),
        "better": better,
        "unit": unit,
        "cost": dict(cost or {}),
        **({"clock": True} if clock else {}),
    }


def number(
    name: str, value: Interval | PairedDifference | float, unit: str, note: str = "", *, clock: bool = False
) -> dict[str, Any]:
    """One row of a summary's `numbers`, as the report and the README tables show it.

    Args:
        clock: the value was read off a clock, so another run will have another one.
    """
    return {"name": name, "value": _plain(value), "unit": unit, "note": note, **({"clock": True} if clock else {})}


def _ends(value: Interval | PairedDifference | float) -> tuple[float, float]:
    return (value, value) if isinstance(value, int | float) else (value.low, value.high)


def _show(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _plain(value: Interval | PairedDifference | float) -> dict[str, Any] | float:
    return value if isinstance(value, int | float) else value.as_dict()
