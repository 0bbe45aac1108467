"""What is measured: tasks that pose and grade problems, strategies that solve them."""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from common.data.problems import Problem, addition_problems
from common.evaluation.extraction import RULES, extract_answer
from common.evaluation.grading import NORMALISATIONS, grade


class Grade(NamedTuple):
    """`correct` is None where no answer could be read. `rule` says how `extracted` was found."""

    correct: bool | None
    extracted: str | None
    rule: str
    reason: str


class Task(Protocol):
    """Poses problems and grades what was written about them. A dataclass, so that its fields describe it."""

    name: str

    def problems(self, split: str, n: int | None, seed: int) -> list[Problem]: ...

    def render(self, problem: Problem) -> str: ...

    def grade(self, problem: Problem, text: str) -> Grade: ...


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of a model: the prompt, what came back, and the model's log-probability of it (nats)."""

    prompt: str
    text: str
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    logprob: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Solution:
    """What a strategy hands in: the text to grade, and the model calls that led to it."""

    answer: str
    steps: tuple[Step, ...] = ()

    @property
    def cost(self) -> dict[str, float]:
        """Tokens and seconds over all steps."""
        return {
            "prompt_tokens": sum(step.prompt_tokens for step in self.steps),
            "generated_tokens": sum(step.generated_tokens for step in self.steps),
            "seconds": sum(step.seconds for step in self.steps),
        }


class Strategy(Protocol):
    """A way to spend tokens on problems. The rooms of October and November are full of them."""

    name: str

    def solve(self, problems: Sequence[Problem], engine: Any) -> list[Solution]: ...


def describe(thing: Any) -> dict[str, Any]:
    """A task or strategy as plain values: its class and its fields. A function counts by its code and what it captured.

    Raises ValueError for a value that cannot be told from another one of its kind.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return describe(value)
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, str | int | float | bool | None):
            return value
        if isinstance(value, functools.partial):
            return ["partial", plain(value.func), plain(value.args), plain(value.keywords)]
        if isinstance(value, types.MethodType):
            return ["method", value.__name__, plain(value.__self__)]
        if isinstance(value, types.FunctionType):
            captured = [plain(cell.cell_contents) for cell in value.__closure__ or ()]
            code = value.__code__
            return [value.__qualname__, code.co_code.hex(), repr(code.co_consts), list(code.co_names), captured]
        raise ValueError(
            f"cannot describe {type(value).__name__} {value!r}: use plain values, dataclasses or functions"
        )

    return {"kind": type(thing).__name__, **{f.name: plain(getattr(thing, f.name)) for f in dataclasses.fields(thing)}}


@dataclasses.dataclass(frozen=True)
class Addition:
    """Sums of two numbers of at most `digits` digits, asked as `47+38=`.

    Attributes:
        answer_order: "forward" asks for 85, "reversed" for 58: the digits in the order in which a sum is carried out.
        rule, normalise: how the answer is read and compared. Changing these changes the measurement, not the model. The
            rule is applied to the right answer as well, as evaluation scripts often do (gallery: spine/last-digit-grading).
    """

    digits: int = 2
    answer_order: Literal["forward", "reversed"] = "forward"
    rule: str = "whole"
    normalise: str = "number"
    name: str = "addition"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("rule", RULES),
            ("normalise", NORMALISATIONS),
            ("answer_order", ("forward", "reversed")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} {getattr(self, field)!r} is unknown; choose one of {', '.join(allowed)}")

    def problems(self, split: str = "test", n: int | None = None, seed: int = 0) -> list[Problem]:
        """`n` problems of the split drawn without replacement, or all of them in order."""
        everything = addition_problems(self.digits, split)
        if n is None:
            return everything
        if not 1 <= n <= len(everything):
            raise ValueError(f"{self.name} with {self.digits} digits has {len(everything)} {split} problems, not {n}")
        return [everything[i] for i in np.random.default_rng(seed).permutation(len(everything))[:n]]

    def render(self, problem: Problem) -> str:
        return problem.question

    def grade(self, problem: Problem, text: str) -> Grade:
        extracted = extract_answer(text[::-1] if self.answer_order == "reversed" else text, self.rule)
        gold = extract_answer(problem.answer, self.rule)
        correct, reason = grade(extracted, gold or problem.answer, normalise=self.normalise)
        return Grade(correct, extracted, self.rule, reason)

    def random_guess(self, problem: Problem, seed: int = 0) -> str:
        """A uniform draw from the possible sums, written as the task wants it: the control."""
        guess = np.random.default_rng((seed, problem.index)).integers(0, 2 * (10**self.digits - 1), endpoint=True)
        return str(guess)[:: -1 if self.answer_order == "reversed" else 1]
