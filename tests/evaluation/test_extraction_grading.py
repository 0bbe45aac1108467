import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.evaluation.extraction import RULES, extract_answer
from common.evaluation.grading import NORMALISATIONS, grade, read_number


@pytest.mark.parametrize(
    ("text", "rule", "answer"),
    [
        ("85", "last_number", "85"),
        ("12 or 13?", "last_number", "13"),
        ("12 or 13?", "first_number", "12"),
        ("it is -7.", "last_number", "-7"),
        ("1,234,567 people", "first_number", "1,234,567"),
        ("1,23 is two numbers", "last_number", "23"),
        ("3.50 dollars", "last_number", "3.50"),
        ("85", "last_digit", "5"),
        ("  85\n", "whole", "85"),
        ("between 10-12", "last_number", "12"),
        ("12 - 5 or -5", "last_number", "-5"),
        ("none", "last_number", None),
        ("", "whole", None),
    ],
)
def test_extraction(text, rule, answer):
    assert extract_answer(text, rule) == answer


def test_unknown_rule_lists_the_known():
    with pytest.raises(ValueError, match="last_number"):
        extract_answer("1", "best")


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("85", "85", True),
        ("085", "85", True),
        ("+85", "85", True),
        ("85.0", "85", True),
        ("1,234", "1234", True),
        ("-5", "5", False),
        ("−5", "-5", True),
        ("86", "85", False),
        ("0.1000000000000000000001", "0.1", False),
        ("8 5", "85", None),
        ("52_8", "528", None),
        ("1e2", "100", None),
        ("９", "9", None),
        ("nan", "85", None),
        ("", "85", None),
        (None, "85", None),
        ("__import__('os')", "85", None),
        ("9**9**9", "85", None),
        ("85", "eighty-five", None),
        ("1" * 10_000, "1", None),
    ],
)
def test_grading(answer, gold, correct):
    verdict = grade(answer, gold)
    assert verdict.correct is correct
    assert verdict.reason


def test_text_normalisation_is_stricter():
    assert grade("085", "85", normalise="text").correct is False
    assert grade(" 85 ", "85", normalise="text").correct is True


@given(st.text(), st.text(), st.sampled_from([*NORMALISATIONS, "unknown"]))
def test_grading_is_total(answer, gold, normalise):
    assert grade(answer, gold, normalise=normalise).correct in (True, False, None)


@given(st.text(), st.sampled_from(list(RULES)))
def test_extraction_is_total_and_takes_from_the_text(text, rule):
    found = extract_answer(text, rule)
    assert found is None or found in text


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_numbers_are_read_exactly(number):
    text = f"{number:f}"
    assert read_number(text) == read_number(f"{number:,f}")
    assert float(read_number(text)) == float(number)
