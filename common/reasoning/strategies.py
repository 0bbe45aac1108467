"""Strategies of January: ask once, add column by column, and not asking at all.

Voting, scoring and refining come in October and November.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from common.data.problems import Problem
from common.evaluation.task import Solution, Step, Task
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams


def ask(engine: Engine, prompts: Sequence[str], params: SamplingParams, indices: Sequence[int]) -> list[Step]:
    """One completion of each prompt, as steps of a solution. Raises ValueError for n > 1: nobody would look at the rest."""
    if params.n != 1:
        raise ValueError(
            f"this strategy takes one completion of each prompt, got n={params.n}: set n=1, or vote (October)"
        )
    params = replace(params, logprobs=True)
    completions = engine.generate([engine.encode(prompt) for prompt in prompts], params, indices=indices)
    return [
        Step(
            prompt=prompt,
            text=first.text,
            finish_reason=first.finish_reason,
            prompt_tokens=first.prompt_tokens,
            generated_tokens=len(first.ids),
            logprob=sum(first.logprobs),
            seconds=first.seconds,
        )
        for prompt, (first, *_) in zip(prompts, completions, strict=True)
    ]


ANSWER = SamplingParams(temperature=0, max_tokens=16)
COLUMN = SamplingParams(temperature=0, max_tokens=4)
MOST_COLUMNS = 1000


@dataclass(frozen=True)
class Ask:
    """One completion for each problem, greedy by default."""

    task: Task
    params: SamplingParams = ANSWER
    name: str = "ask"

    def solve(self, problems: Sequence[Problem], engine: Engine) -> list[Solution]:
        prompts = [self.task.render(problem) for problem in problems]
        # The problem's own index, not its place in this batch: a resumed run must draw the same numbers.
        steps = ask(engine, prompts, self.params, [problem.index for problem in problems])
        return [Solution(step.text, (step,)) for step in steps]


@dataclass(frozen=True)
class Scripted:
    """No model: `answer(problem)` is the text. For controls (a random guess) and oracles (the right answer)."""

    name: str
    answer: Callable[[Problem], str]

    def solve(self, problems: Sequence[Problem], engine: object = None) -> list[Solution]:
        return [Solution(self.answer(problem)) for problem in problems]


@dataclass(frozen=True)
class Columns:
    """Add as on paper: ask for one column at a time, `7+8+1=`, and carry.

    The model supplies two hundred facts, the loop supplies the procedure. So this measures a system, not a model; who
    does which part is in the traces. The model must have learned answers in reversed order (`61` for 16): then the
    digit that is written down comes first and the carry second.

    The last carry is always written, so an answer may begin with 0.
    """

    params: SamplingParams = COLUMN
    name: str = "columns"

    def solve(self, problems: Sequence[Problem], engine: Engine) -> list[Solution]:
        numbers = [problem.question.removesuffix("=").split("+") for problem in problems]
        lengths = [max(map(len, pair)) for pair in numbers]
        written, carries = [""] * len(problems), ["0"] * len(problems)
        steps: list[list[Step]] = [[] for _ in problems]
        for column in range(max(lengths, default=0)):
            going = [i for i, length in enumerate(lengths) if column < length]  # others are done: no neighbour adds a 0
            prompts = [
                "+".join([*(number.zfill(column + 1)[-1 - column] for number in numbers[i]), carries[i]]) + "="
                for i in going
            ]
            # Each column draws its own random numbers, whatever else is in the batch.
            indices = [problems[i].index * MOST_COLUMNS + column for i in going]
            for i, step in zip(going, ask(engine, prompts, self.params, indices), strict=True):
                steps[i].append(step)
                digit, carry = f"{step.text}0"[:1], f"{step.text}00"[1]
                written[i], carries[i] = digit + written[i], carry if carry.isdecimal() else "0"
        return [
            Solution(carry + digits, tuple(made)) for carry, digits, made in zip(carries, written, steps, strict=True)
        ]
