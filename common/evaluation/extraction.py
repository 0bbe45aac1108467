"""From what a model wrote to the answer that is graded. The rule is part of the measurement, so it has a name.

Two rules can differ by more than two models do: `last_digit` exists to show that.
"""

import re

# A sign after a digit is a minus or a hyphen: "10-12" holds 10 and 12.
_NUMBER = r"(?:(?<!\d)[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"

RULES = {
    "last_number": "the last number in the text",
    "first_number": "the first number in the text",
    "whole": "the whole text without surrounding white space",
    "last_digit": "the last digit in the text: too lenient where the right answer is cut alike; kept as a warning",
}


def extract_answer(text: str, rule: str = "last_number") -> str | None:
    """The answer in `text` under a named rule, or None where there is none.

    >>> extract_answer("47+38 is 85, I think.")
    '85'
    >>> extract_answer("so -1,234.5 in all")
    '-1,234.5'
    >>> extract_answer("no idea") is None
    True
    """
    if rule not in RULES:
        raise ValueError(f"extraction rule {rule!r} is unknown; choose one of {', '.join(RULES)}")
    if rule == "whole":
        return text.strip() or None
    found = re.findall(r"\d" if rule == "last_digit" else _NUMBER, text)
    if not found:
        return None
    return found[0] if rule == "first_number" else found[-1]
