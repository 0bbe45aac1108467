import pytest

from common.foundation.months import MONTHS, load, month, months_in


def test_twelve_months_in_order():
    assert [m.number for m in MONTHS] == list(range(1, 13))
    assert all(m.folder.startswith(f"{m.number:02d}_") for m in MONTHS)


@pytest.mark.parametrize("which", [1, "1", "01", "01_spine"])
def test_found_by_any_name(which):
    assert month(which).folder == "01_spine"


@pytest.mark.parametrize("text", ["0", "13", "1-", "a", "3-2", "1,,2", ""])
def test_bad_ranges_are_errors(text):
    with pytest.raises(ValueError, match="months"):
        months_in(text)


def test_a_month_that_is_not_built_says_so():
    with pytest.raises(ValueError, match="has not landed yet"):
        load("12_rl_distill", "run")
