"""Procedural arithmetic in several steps: problems, worked traces, and a judge of traces.

What the year's base model is pretrained on, and what reasoning is measured on until December. Four families:

    family     question                  what one step does                                   valid traces
    sums       add 47 16 82              adds any two of the numbers present                  many
    checksum   checksum 7 8 3            adds any two of the digits present, modulo 10        many
    mod_chain  chain 3 +4 *7 -2          carries out the first operation, modulo 10           one
    plain_sum  sum 7 21 3                (small enough to need no steps)                      the empty one

A step is a line `47+82=129; 16 129`: what is computed, and what is left. The last line of a document is `answer 145`.
Each question can also be asked as a sentence; trace and answer stay the same.

The numbers of a problem, in any order, wording or family, belong to one split. In a document of the train split a step
is only taken if what is left, where it has as many numbers as a problem, is in train as well. So no training document
states or passes through a problem that is held out.
"""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from common.data.arithmetic_families import FAMILIES, NUMBER, Family, Terms, cached_split, parse
from common.data.documents import Document
from common.data.problems import Problem
from common.data.split import FRACTIONS

LISTED = 150_000  # up to so many problems of one size are listed; larger spaces are sampled
PATIENCE = 10_000  # draws in a row without a new problem after which a sampled space counts as used up

STEP = re.compile(f"({NUMBER})([+*-]{NUMBER})=({NUMBER}); (.*)")
ANSWER = re.compile(f"answer ({NUMBER})")


def worked(question: str, trace: str, answer: str) -> str:
    """A whole document: question, trace, answer. What a model is prompted with is `question + "\\n"`.

    >>> print(worked("add 47 16 82", "47+82=129; 16 129\\n16+129=145; 145\\n", "145"))
    add 47 16 82
    47+82=129; 16 129
    16+129=145; 145
    answer 145
    """
    return "\n".join([question, *trace.splitlines(), f"answer {answer}"])


def problems(
    family: str, split: str, n: int, seed: int, *, sizes: Sequence[int] | None = None, style: str = "plain"
) -> list[Problem]:
    """`n` problems of a split, no two with the same numbers. The first m of them are the list for n=m.

    Each size is equally likely while it has problems left. The style changes the wording alone, so the same seed asks
    the same problems in both styles.

    Args:
        sizes: how many numbers a problem may have (a chain of k operations has k + 1), or None for all of the family.

    Raises ValueError if a name is unknown, a size impossible, or the split has fewer than `n` such problems.

    >>> [problem.question for problem in problems("plain_sum", "test", 2, seed=0)]
    ['sum 22 7 21', 'sum 3 23 25']
    >>> problems("plain_sum", "test", 1, seed=0, style="sentence")[0].question
    '22 red shells, 7 blue and 21 green shells: how many is that?'
    """
    kind = _known("family", family, FAMILIES)
    _known("split", split, FRACTIONS)
    _known("style", style, ("plain", "sentence"))
    chosen = [size for size in kind.sizes if sizes is None or size in sizes]
    if not chosen or not set(sizes or ()) <= set(chosen):
        raise ValueError(f"sizes {sizes} are impossible: {family} has {kind.sizes[0]} to {kind.sizes[-1]} numbers")
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    streams = [_stream(kind, size, split, _rng(seed, family, split, size)) for size in chosen]
    rng, wording = _rng(seed, family, split, chosen), _rng(seed, family, split, chosen, style)
    found: list[Problem] = []
    while len(found) < n and streams:
        stream = streams[int(rng.random() * len(streams))]
        if (terms := next(stream, None)) is None:
            streams.remove(stream)
            continue
        template = int(wording.random() * len(kind.sentences)) if style == "sentence" else None
        name = " ".join([kind.word, *terms]) + ("" if template is None else f" / {template}")
        index = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 2  # 62 bits
        question = name if template is None else kind.say(terms, template)
        numbers = tuple(int(term.lstrip("+-*")) for term in terms)
        found.append(Problem(name, index, question, str(kind.solve(terms)), family, numbers))
    if len(found) < n:
        raise ValueError(f"{family} has {len(found)} {split} problems of sizes {chosen}, not {n}: lower n")
    return found


def _known(field: str, name: str, allowed: Collection[str]) -> Any:
    if name not in allowed:
        raise ValueError(f"{field} {name!r} is unknown; choose one of {', '.join(allowed)}")
    return allowed[name] if isinstance(allowed, Mapping) else name


def _rng(seed: int, *parts: object) -> np.random.Generator:
    """A generator of its own for each purpose; a hash, because numpy seeds with numbers only."""
    return np.random.default_rng(list(hashlib.sha256(repr((int(seed), *parts)).encode()).digest()))


@lru_cache
def _members(family: Family, size: int, split: str) -> tuple[list[Terms], np.ndarray]:
    """Every problem of a small space, with the number of orders that it can be drawn in."""
    numbers = [str(number) for number in range(family.low, family.high + 1)]
    everything = itertools.combinations_with_replacement(numbers, size)
    members = [terms for terms in everything if family.split(terms) == split]
    orders = [math.factorial(size) / math.prod(map(math.factorial, Counter(terms).values())) for terms in members]
    return members, np.array(orders)


def _stream(family: Family, size: int, split: str, rng: np.random.Generator) -> Iterator[Terms]:
    """Distinct problems in the order in which drawing numbers again and again would meet them first."""
    if not family.chain and math.comb(family.high - family.low + size, size) <= LISTED:
        members, orders = _members(family, size, split)
        for i in np.argsort(rng.exponential(size=len(members)) / orders):  # equal in law, and it comes to an end
            yield tuple(members[i][j] for j in rng.permutation(size))
        return
    seen: set[Terms] = set()
    misses = 0
    while misses < PATIENCE:
        terms = family.draw(size, rng)
        same = terms if family.chain else tuple(sorted(terms))
        if same in seen or family.split(terms) != split:
            misses += 1
        else:
            seen.add(same)
            misses = 0
            yield terms


def trace(problem: Problem, rng: np.random.Generator, *, training: bool = False) -> str | None:
    """The lines of a worked trace, drawn at random among the valid ones; "" where no steps are needed.

    Args:
        training: draw a trace to train on, which passes through no problem that is held out. It is None in the rare
            case that no such step is left: draw another problem.

    Raises ValueError if the problem is to be trained on and is not in train.

    >>> (problem,) = problems("sums", "train", 1, seed=0, sizes=[4])
    >>> print(trace(problem, np.random.default_rng(0), training=True), end="")
    56+92=148; 91 43 148
    91+43=134; 148 134
    148+134=282; 282
    """
    family, terms = parse(problem)
    if training and (split := family.split(terms)) != "train":
        raise ValueError(f"problem {problem.name!r} is in {split}: train on problems of the train split")
    return family.work(terms, rng, training)


class Verdict(NamedTuple):
    """`line` is the first wrong line, from 0, and `reason` says why. `answer` is what the last line states, if it does.

    `line` is None if all is well, or if the problem itself is not one of this module.
    """

    ok: bool
    line: int | None
    reason: str
    answer: int | None


def check_trace(problem: Problem, text: str) -> Verdict:
    """Judge what a model wrote after the question: the steps, and then the answer. Every text gets a verdict.

    Valid is every path: any two of the numbers present, the right result, and what is left as a multiset in any order
    (in a chain, as it stands). One line break after the answer is allowed.

    >>> problem = Problem("add 47 16 82", 0, "add 47 16 82", "145")
    >>> check_trace(problem, "82+47=129; 129 16\\n16+129=145; 145\\nanswer 145")
    Verdict(ok=True, line=None, reason='valid', answer=145)
    >>> check_trace(problem, "47+82=129; 16 129\\n16+129=155; 155\\nanswer 155")
    Verdict(ok=False, line=1, reason='16+129 is 145, not 155', answer=155)
    """
    lines = text.removesuffix("\n").split("\n")
    said = ANSWER.fullmatch(lines[-1])
    answer = int(said[1]) if said else None
    try:
        family, present = parse(problem)
    except ValueError as error:
        return Verdict(False, None, str(error), answer)
    steps = len(present) - 1 if family.steps else 0
    for i, line in enumerate(lines):
        if i < steps:
            reason, present = _check_step(family, present, line)
        elif i == steps:
            right = f"answer {family.solve(present)}"
            reason = "" if line == right else f"this line must be {right!r}"
        else:
            reason = "text after the answer"
        if reason:
            return Verdict(False, i, reason, answer)
    if len(lines) <= steps:
        return Verdict(False, len(lines), f"the text ends after {len(lines)} of {steps} steps", answer)
    return Verdict(True, None, "valid", answer)


def _check_step(family: Family, present: Terms, line: str) -> tuple[str, Terms]:
    """Why a step is wrong ("" if it is right), and the terms that are left after it."""
    if not (found := STEP.fullmatch(line)):
        return "not a line such as '47+82=129; 16 129'", present
    a, term, result, listed = found.groups()
    if family.chain:
        if (a, term) != present[:2]:
            return f"the next step is {present[0]}{present[1]}, not {a}{term}", present
        left = present[2:]
    else:
        if term[0] != "+" or Counter((a, term[1:])) - Counter(present):
            return f"{a}{term} does not add two of the numbers {' '.join(present)}", present
        left = tuple((Counter(present) - Counter((a, term[1:]))).elements())
    right = str(family.apply(int(a), term))
    if result != right:
        return f"{a}{term} is {right}, not {result}", present
    left = (right, *left) if family.chain else (*left, right)
    listed = listed.split(" ")
    if (listed != list(left)) if family.chain else (Counter(listed) != Counter(left)):
        return f"what is left is {' '.join(left)}", present
    return "", left


def training_documents(
    split: str, count: int, seed: int, *, families: Mapping[str, float] | None = None, styles: float = 0.25
) -> list[Document]:
    """Worked problems to train on, drawn with repetition: numbers, wording and path of each at random.

    Args:
        families: name -> weight (equal ones by default).
        styles: the share of documents that ask in a sentence.

    Raises ValueError if a name is unknown, or a weight or share impossible.

    >>> (document,) = training_documents("train", 1, seed=0)
    >>> print(document.name, document.text, sep=": ")
    sums train 0.0: add 71 42 76
    42+76=118; 71 118
    71+118=189; 189
    answer 189
    """
    _known("split", split, FRACTIONS)
    weights = dict.fromkeys(FAMILIES, 1.0) if families is None else families
    kinds = [_known("family", name, FAMILIES) for name in weights]
    if not kinds or min(weights.values()) < 0 or not 0 < sum(weights.values()) < math.inf:
        raise ValueError(f"families must have weights of at least 0, and one above 0, got {dict(weights)}")
    if not 0 <= styles <= 1 or count < 0:
        raise ValueError(f"styles must lie between 0 and 1 and count must be at least 0, got {styles} and {count}")
    edges = np.cumsum(list(weights.values()))
    places = np.searchsorted(edges / edges[-1], _rng(seed, "families", split).random(count), "right")
    rng = _rng(seed, "documents", split)
    documents = []
    for i, place in enumerate(places.tolist()):
        family = kinds[place]
        size, in_words, template = rng.random(3).tolist()
        size = family.sizes[int(size * len(family.sizes))]
        lines = None
        while lines is None:
            terms = family.draw(size, rng)
            lines = family.work(terms, rng, split == "train") if family.split(terms) == split else None
        if in_words < styles:
            question = family.say(terms, int(template * len(family.sentences)))
        else:
            question = " ".join([family.word, *terms])
        text = worked(question, lines, str(family.solve(terms)))
        documents.append(Document(f"{family.name} {split} {seed}.{i}", family.name, text))
    return documents


def drill_documents(
    count: int, seed: int, *, lines: int = 12, skewed: float = 1.0, split: str | None = "train"
) -> list[Document]:
    """Single additions, as they occur in the traces of `sums`: practice without the lists around it.

    A line of a trace is mostly bookkeeping; here every ten characters hold an addition. Two numbers are no problem of any
    family, so nothing that is held out is stated.

    With uniform digits the last digit of a sum is independent of the last digit of either number: like parity, it gives a
    gradient nothing to begin with, and a training sits at chance until it jumps. In a skewed line small digits are
    frequent, so that one number alone already says something about the result.

    Args:
        lines: additions in a document.
        skewed: the share of lines whose digits after the first are drawn with weight 1 / (1 + digit).
        split: the pairs have a split of their own, by their hash, so that some are in no drill.

    >>> print(drill_documents(1, seed=0, lines=2)[0].text)
    220+70=290
    81+31=112
    """
    _known("split", split, FRACTIONS)
    said = itertools.islice(_drill_lines(_rng(seed, "drills", split), skewed, split), count * lines)
    texts = ("\n".join(itertools.islice(said, lines)) for _ in range(count))
    return [Document(f"drill {seed}.{i}", "drill", text) for i, text in enumerate(texts)]


DIGIT_WEIGHTS = 1 / np.arange(1, 11)


def _drill_lines(rng: np.random.Generator, skewed: float, split: str) -> Iterator[str]:
    """Lines without end, drawn a thousand at a time."""
    while True:
        # The larger number is a sum of one to seven two-digit numbers, as a partial sum is.
        parts, added = rng.integers(10, 100, (1000, 7)), rng.integers(1, 8, (1000, 1))
        large, small = (parts * (np.arange(7) < added)).sum(axis=1), rng.integers(10, 100, 1000)
        skew, swap = rng.random(1000) < skewed, rng.random(1000) < 0.5
        large, small = (np.where(skew, with_small_digits(numbers, rng), numbers) for numbers in (large, small))
        for a, b, swapped in zip(large.tolist(), small.tolist(), swap.tolist(), strict=True):
            if cached_split(f"{min(a, b)}+{max(a, b)}") == split:  # in either order
                yield f"{b}+{a}={a + b}" if swapped else f"{a}+{b}={a + b}"


def with_small_digits(numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every digit after the first drawn again, small ones more often: a 0 a third of the time, a 9 a thirtieth.

    The first digit and the length stay, and with them about how much is added.
    """
    places = 10 ** np.arange(9)  # of units, tens, ...
    drawn = rng.choice(10, size=(len(numbers), len(places)), p=DIGIT_WEIGHTS / DIGIT_WEIGHTS.sum())
    after_the_first = places * 10 <= numbers[:, None]
    leading = places[after_the_first.sum(axis=1)]
    return numbers // leading * leading + (drawn * places * after_the_first).sum(axis=1)
