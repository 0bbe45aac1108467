"""A plugin of pytest: notebooks are compared word by word, and numbers that a training decides within a tolerance.

Another processor adds up in another order, and a training makes of the last digit the second one. So a cell may say in
its metadata how far its numbers may move, and why:

    "numbers": {"relative": 0.02, "absolute": 0.005, "counts": 2, "why": "a training decides them"}

A number with a decimal point or an exponent agrees with the committed one if they differ by at most `absolute` or
`relative` times the committed one, whichever is larger; a whole number if they differ by at most `counts`. What a cell
does not state is zero, and a cell that states nothing is compared as nbval compares it: every character.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import zip_longest
from typing import Any

from nbval.plugin import IPyNbCell

# A number stands alone: the digits of bf16, layer0, 5-gram, GPT-2 and 1.2.3 belong to words, which must be equal. A sign
# belongs to the number unless a word or a number comes right before it, as in 55+12.
NUMBER = re.compile(
    r"""(?<![\w.])(?<!\w-)
        ( [+-]?                          # a sign
          (?: \d{1,3}(?:,\d{3})+ | \d+ ) # 1,234,567 or 1234567
          (?: \.\d+ )?
          (?: [eE][+-]?\d+ )? )
        (?!\w) (?!-[^\W\d]) (?!\.\d)""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Tolerance:
    """How far the numbers of a cell may move, and in one sentence why."""

    why: str
    relative: Decimal = Decimal(0)
    absolute: Decimal = Decimal(0)
    counts: int = 0

    @classmethod
    def of(cls, metadata: Mapping[str, Any], where: str) -> "Tolerance | None":
        """What a cell's metadata state; None if nothing. ValueError names the cell, which is at `where`."""
        stated = metadata.get("numbers")
        if stated is None:
            return None
        if not isinstance(stated, Mapping):
            raise ValueError(
                f"{where}: numbers must be an object with relative, absolute, counts and why, not {stated!r}"
            )
        unknown = sorted(set(stated) - {"relative", "absolute", "counts", "why"})
        if unknown:
            raise ValueError(f"{where}: numbers has unknown keys {unknown}; known are relative, absolute, counts, why")
        why = stated.get("why")
        if not (isinstance(why, str) and why.strip()):
            raise ValueError(f"{where}: numbers must say in one sentence why they may move, as why")
        for name in ("relative", "absolute", "counts"):
            value, kinds = stated.get(name, 0), (int,) if name == "counts" else (int, float)
            if type(value) not in kinds or not 0 <= value < (1 if name == "relative" else float("inf")):
                raise ValueError(
                    f"{where}: {name} is {value!r}; it must be a number from 0, counts whole, relative below 1"
                )
        if not any(stated.get(name) for name in ("relative", "absolute", "counts")):
            raise ValueError(f"{where}: numbers states no tolerance; give relative, absolute or counts, or remove it")
        exact = {name: Decimal(str(stated.get(name, 0))) for name in ("relative", "absolute")}
        return cls(why, **exact, counts=stated.get("counts", 0))

    def objection(self, made: str, committed: str) -> str | None:
        """Why one written number does not agree with another; None if it does."""
        decimal = any(mark in number for number in (made, committed) for mark in ".eE")
        # Decimal, because 0.3 - 0.2 is more than 0.1 in binary.
        new, old = (Decimal(number.replace(",", "")) for number in (made, committed))
        allowed = max(self.absolute, self.relative * abs(old)) if decimal else Decimal(self.counts)
        if abs(new - old) <= allowed:
            return None
        stated = f"relative {self.relative}, absolute {self.absolute}" if decimal else f"counts {self.counts}"
        return f"{made} where {committed} is committed, apart by {abs(new - old)}; allowed is {allowed:.3g} ({stated})"


def difference(made: str, committed: str, tolerance: Tolerance) -> str | None:
    """The first difference between two texts that the tolerance does not allow, with its line; None if they agree."""
    lines = zip_longest(made.split("\n"), committed.split("\n"))
    for number, (new, old) in enumerate(lines, start=1):
        if new is None or old is None:
            return f"line {number}: {'is missing' if new is None else 'is too many'}: {old if new is None else new!r}"
        objection = _difference_of_lines(new, old, tolerance)
        if objection:
            return f"line {number}: {objection}\n    made      {new}\n    committed {old}"
    return None


def _difference_of_lines(made: str, committed: str, tolerance: Tolerance) -> str | None:
    # Splitting by a pattern with one group gives words, number, words, number, ..., words.
    new, old = NUMBER.split(made), NUMBER.split(committed)
    if [_words(part) for part in new[::2]] != [_words(part) for part in old[::2]]:
        return "the words differ"
    return next(filter(None, map(tolerance.objection, new[1::2], old[1::2])), None)


def _words(between: str) -> str:
    """The text before a number, without the padding: a minus sign takes the place of a blank, or moves a column."""
    return re.sub(r"[ \t]+", " ", between).rstrip(" ")


def texts_of(output: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of an output where its texts are: a stream holds its text itself, the others have `data`."""
    return output if output["output_type"] == "stream" else output.get("data", {})


strictly = IPyNbCell.compare_outputs


def compare_outputs(cell: IPyNbCell, test: list, ref: list, skip_compare: tuple | None = None) -> bool:
    """nbval's comparison, after each text that agrees within the tolerance was replaced by the committed one.

    So everything that is no text, the number and the kinds of the outputs too, stays nbval's to compare.
    """
    tolerance = Tolerance.of(cell.cell.metadata, f"{cell.path.parent.name}/{cell.path.name}, code cell {cell.cell_num}")
    if tolerance is None:
        return strictly(cell, test, ref, skip_compare)
    adopted = copy.deepcopy(test)
    for made, committed in zip(adopted, ref, strict=False):
        new, old = texts_of(made), texts_of(committed)
        for kind in {"text", "text/plain", "text/html", "text/markdown"} & set(new) & set(old):
            found = difference(cell.sanitize(new[kind]), cell.sanitize(old[kind]), tolerance)
            if found:
                cell.comparison_traceback = [f"{kind}, {found}"]
                return False
            new[kind] = old[kind]
    return strictly(cell, adopted, ref, skip_compare)


def pytest_collection_modifyitems(items: list) -> None:
    """nbval waits five seconds for each piece of output; a kernel on a busy machine may take longer to send it."""
    for item in items:
        if isinstance(item, IPyNbCell):
            item.output_timeout = 600


# nbval has no hook between running a cell and comparing its outputs; this is the one method where both are at hand.
IPyNbCell.compare_outputs = compare_outputs
