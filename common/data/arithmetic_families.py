"""The four families of arithmetic problems: how one is drawn, told, split, solved and worked.

What is asked of them (samples, traces, a judge, training documents) is in common/data/arithmetic.py.
"""

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from common.data.problems import Problem
from common.data.split import hash_split

OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
VERBS = {"+": "add", "-": "subtract", "*": "multiply by"}

NUMBER = "(?:0|[1-9][0-9]{0,8})"  # ASCII digits, no leading zeros, and never so long that int() would refuse
LIST = re.compile(f"{NUMBER}(?: {NUMBER})*")
CHAIN = re.compile(f"{NUMBER}(?: [+*-]{NUMBER})*")

cached_split = lru_cache(maxsize=2**15)(hash_split)  # short lists come up again and again

Terms = tuple[str, ...]  # what follows the first word of a question: ("47", "16", "82") or ("3", "+4", "*7", "-2")


@dataclass(frozen=True)
class Family:
    """One kind of problem.

    Attributes:
        word: the first word of its plain question.
        low, high: the numbers drawn, both included.
        sizes: how many numbers a problem may have.
        modulus: results are taken modulo this number; 0 leaves them as they are.
        chain: the terms carry operators and are worked from left to right.
        steps: whether there is anything between question and answer.
        sentences: how the first number is told | each further one | the last one | what is asked; {} is the number.
    """

    name: str
    word: str
    low: int
    high: int
    sizes: range
    modulus: int = 0
    chain: bool = False
    steps: bool = True
    sentences: tuple[str, ...] = ()

    def draw(self, size: int, rng: np.random.Generator) -> Terms:
        """Terms of `size` numbers, each drawn uniformly, and so are the operators."""
        span = self.high - self.low + 1
        numbers = [str(self.low + int(u * span)) for u in rng.random(size).tolist()]
        if self.chain:
            signs = ["+-*"[int(3 * u)] for u in rng.random(size - 1).tolist()]
            return (numbers[0], *(sign + number for sign, number in zip(signs, numbers[1:], strict=True)))
        return tuple(numbers)

    def key(self, terms: Terms) -> str:
        """What the split is a function of.

        The sorted numbers, whatever the family, for `add 12 20 30` gives away `sum 12 20 30`. In a chain the order
        matters, and it is worked in one way only: so it goes by the shortest chain of its family that it comes down to,
        `1 +2 +4 *7 -2` by `3 +4 *7 -2`.

        >>> FAMILIES["sums"].key(("82", "47", "16")), FAMILIES["mod_chain"].key(("1", "+2", "+4", "*7", "-2"))
        ('16 47 82', '3 +4 *7 -2')
        """
        if self.chain:
            done = len(terms) - self.sizes[0] + 1
            return " ".join([str(self.solve(terms[:done])), *terms[done:]])
        return " ".join(sorted(terms, key=int))

    def split(self, terms: Terms) -> str:
        """The split that a problem, or what is left after a step, belongs to."""
        return cached_split(self.key(terms))

    def solve(self, terms: Terms) -> int:
        """The right answer.

        >>> FAMILIES["checksum"].solve(("7", "8", "3")), FAMILIES["mod_chain"].solve(("3", "+4", "*7", "-2"))
        (8, 7)
        """
        value = int(terms[0])
        for term in terms[1:]:
            value = self.apply(value, term if self.chain else "+" + term)
        return value

    def apply(self, value: int, term: str) -> int:
        """One step: 3 and "*7" are 1 in a family that counts modulo 10."""
        result = OPERATORS[term[0]](value, int(term[1:]))
        return result % self.modulus if self.modulus else result

    def say(self, terms: Terms, template: int) -> str:
        """The question as a sentence; `template` is a position in `sentences`.

        >>> FAMILIES["mod_chain"].say(("3", "+4", "*7", "-2"), 0)
        'Let a dial work modulo 10: start with 3, add 4, multiply by 7 and subtract 2. What is the result?'
        """
        start, further, last, end = self.sentences[template].split("|")
        told = [f"{VERBS[term[0]]} {term[1:]}" for term in terms[1:]] if self.chain else terms[1:]
        return "".join([start.format(terms[0]), *map(further.format, told[:-1]), last.format(told[-1]), end])

    def work(self, terms: Terms, rng: np.random.Generator, training: bool = False) -> str | None:
        """The lines of a valid trace, each pair of numbers drawn uniformly from those present.

        With `training` a pair is only drawn if what it leaves is in train or shorter than a problem; None if there is
        no such pair. A chain needs no such rule: all that it comes down to, as far as it is a problem, has its key.
        """
        lines = []
        if self.chain:
            value = int(terms[0])
            for i, term in enumerate(terms[1:], start=2):
                before, value = value, self.apply(value, term)
                lines.append(f"{before}{term}={value}; {' '.join([str(value), *terms[i:]])}\n")
        elif self.steps:
            present = terms
            while len(present) > 1:
                pairs = list(itertools.combinations(range(len(present)), 2))
                while pairs:
                    i, j = pairs.pop(int(rng.random() * len(pairs)))
                    a, b = present[i], present[j]
                    result = str(self.apply(int(a), "+" + b))
                    left = (*present[:i], *present[i + 1 : j], *present[j + 1 :], result)
                    if not training or len(left) < self.sizes[0] or self.split(left) == "train":
                        break
                else:
                    return None  # every pair was tried
                lines.append(f"{a}+{b}={result}; {' '.join(left)}\n")
                present = left
        return "".join(lines)


def _sentences(nouns: str, *templates: str) -> tuple[str, ...]:
    return tuple(template.replace("NOUN", noun) for template in templates for noun in nouns.split())


_SUMS = _sentences(
    "apples nails books coins stones letters",
    "A basket holds {} NOUN|, another {}| and one more {}|. How many NOUN are there?",
    "Anna counts NOUN every day: {}|, {}| and {}|. How many NOUN has she counted?",
    "There are {} NOUN on the table|, then {} more come| and at last {} more|. How many NOUN are there now?",
    "A shop sells {} NOUN|, then {}| and then {}|. How many NOUN were sold?",
)
_CHECKSUM = _sentences(
    "ticket parcel key bottle card",
    "A NOUN has the digits {}|, {}| and {}|. What is the last digit of their sum?",
    "The code of a NOUN is {}| {}| {}|. Add its digits and keep the last digit.",
    "Add {}|, {}| and {}| modulo 10 to check the NOUN. What do you get?",
)
_CHAIN = _sentences(
    "dial counter wheel clock",
    "Let a NOUN work modulo 10: start with {}|, {}| and {}|. What is the result?",
    "A NOUN works modulo 10 and shows {}. Now| {},| and {}|. What does it show?",
    "A NOUN that works modulo 10 is set to {}|, then {}|, at last {}|. Where does it stop?",
)
_PLAIN = _sentences(
    "pens cards shells eggs cups seeds",
    "Tom has {} NOUN|, Ida has {}| and Sam has {}|. How many NOUN do they have together?",
    "One box has {} NOUN|, the second {}| and the third {}|. How many NOUN are in the boxes?",
    "{} red NOUN|, {} blue| and {} green NOUN|: how many is that?",
)
FAMILIES: dict[str, Family] = {
    "sums": Family("sums", "add", 10, 99, range(3, 9), sentences=_SUMS),
    "checksum": Family("checksum", "checksum", 0, 9, range(3, 11), modulus=10, sentences=_CHECKSUM),
    "mod_chain": Family("mod_chain", "chain", 0, 9, range(4, 10), modulus=10, chain=True, sentences=_CHAIN),
    "plain_sum": Family("plain_sum", "sum", 1, 30, range(3, 4), steps=False, sentences=_PLAIN),
}
WORDS = {family.word: family for family in FAMILIES.values()}


def parse(problem: Problem) -> tuple[Family, Terms]:
    """Family and terms from the name alone, so that problems read back from a file can be checked as well."""
    word, *terms = problem.name.partition(" / ")[0].split(" ")
    family = WORDS.get(word)
    if not family or len(terms) not in family.sizes or not (CHAIN if family.chain else LIST).fullmatch(" ".join(terms)):
        raise ValueError(f"problem {problem.name!r} is not one of common.data.arithmetic")
    return family, tuple(terms)
