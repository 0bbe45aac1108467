"""Is this answer right? A total function: it never raises and never runs the text that it grades."""

import re
from fractions import Fraction
from typing import NamedTuple

# Long enough for any answer of the year, short enough that arithmetic on it is instant (gallery of September).
LONGEST = 200
NORMALISATIONS = {
    "number": "equal as exact numbers: 85, 085, +85, 85.0 and 1,234 = 1234 are one answer each",
    "text": "equal as texts, without surrounding white space",
}


class Verdict(NamedTuple):
    """`correct` is None where the answer could not be read; that is neither right nor wrong, and counted apart."""

    correct: bool | None
    reason: str


def grade(answer: str | None, gold: str, *, normalise: str = "number") -> Verdict:
    """Compare an extracted answer with the right one.

    Args:
        answer: what `extract_answer` found; None where it found nothing.
        gold: the right answer, in a form that the normalisation can read.

    >>> grade("085", "85")
    Verdict(correct=True, reason='equal as numbers')
    >>> grade("085", "85", normalise="text")
    Verdict(correct=False, reason='085 is not 85')
    >>> grade(None, "85").correct is None
    True
    """
    if normalise not in NORMALISATIONS:
        return Verdict(None, f"normalisation {normalise!r} is unknown; choose one of {', '.join(NORMALISATIONS)}")
    if answer is None or not answer.strip():
        return Verdict(None, "no answer")
    if normalise == "text":
        same = answer.strip() == gold.strip()
        return Verdict(same, "equal as texts" if same else f"{_short(answer)} is not {_short(gold)}")
    given, right = read_number(answer), read_number(gold)
    if right is None:
        return Verdict(None, f"the right answer {_short(gold)} is not a number; grade it with normalise='text'")
    if given is None:
        return Verdict(None, f"{_short(answer)} is not a number")
    return Verdict(given == right, "equal as numbers" if given == right else f"{given} is not {right}")


def read_number(text: str) -> Fraction | None:
    """A decimal number with optional sign and thousands separators, exactly; None for anything else."""
    text = text.strip().replace("−", "-")
    if len(text) > LONGEST or not re.fullmatch(r"[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?", text, flags=re.ASCII):
        return None
    return Fraction(text.replace(",", ""))


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 40 else text[:37] + "…"
