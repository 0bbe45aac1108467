"""Procedural problems with a checkable answer, split by a hash of the problem.

January has one family: the sum of two numbers. The split does not depend on the order of the numbers, so that 38+47 in
training does not give away 47+38 in the test.
"""

from dataclasses import dataclass

import numpy as np

from common.data.documents import Document
from common.data.split import FRACTIONS, hash_split


@dataclass(frozen=True)
class Problem:
    """A question with its answer.

    Attributes:
        name: what identifies it, such as "47+38".
        index: a number of its own, the same in every sample of problems; it seeds the problem's random draws.
        question: the text that is asked.
        answer: the right answer as text.
        family: the kind of problem, where there are several (common/data/arithmetic.py).
        numbers: the numbers in the question, in its order, where the family says so.
    """

    name: str
    index: int
    question: str
    answer: str
    family: str = ""
    numbers: tuple[int, ...] = ()


def addition_problems(digits: int, split: str) -> list[Problem]:
    """Every sum of two numbers of at most `digits` digits in that split, in numerical order.

    >>> problems = addition_problems(1, "test")
    >>> len(problems), problems[0]
    (10, Problem(name='0+3', index=3, question='0+3=', answer='3', family='', numbers=()))
    """
    if split not in FRACTIONS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(FRACTIONS)}")
    top = 10**digits
    return [
        Problem(f"{a}+{b}", a * top + b, f"{a}+{b}=", str(a + b))
        for a in range(top)
        for b in range(top)
        if hash_split(f"{min(a, b)}+{max(a, b)}") == split
    ]


def solved_documents(
    problems: list[Problem], *, reverse_answer: bool = False, shuffle_answers: int | None = None
) -> list[Document]:
    """Each problem with its answer as a document to train on.

    Args:
        reverse_answer: write the digits of the answer from right to left.
        shuffle_answers: a seed; every problem gets the answer of another one (a control: form without knowledge).
    """
    answers = [problem.answer[:: -1 if reverse_answer else 1] for problem in problems]
    if shuffle_answers is not None:
        answers = [answers[i] for i in np.random.default_rng(shuffle_answers).permutation(len(answers))]
    return [
        Document(problem.name, "addition", problem.question + answer)
        for problem, answer in zip(problems, answers, strict=True)
    ]


def column_facts() -> list[Problem]:
    """The two hundred sums of two digits and a carry, `7+8+1=`: what adding on paper needs to know by heart."""
    return [
        Problem(f"{a}+{b}+{c}", a * 20 + b * 2 + c, f"{a}+{b}+{c}=", f"{a + b + c:02d}")
        for a in range(10)
        for b in range(10)
        for c in range(2)
    ]
