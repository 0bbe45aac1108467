"""Run a strategy on a task, keep every sample, and report accuracy with its interval, its cost and its failures.

Traces are the evidence: one JSON line for each problem, appended as it is solved, under a header that says which
model, tokenizer, task and strategy they belong to. A killed evaluation continues from them; an evaluation of anything
else refuses to (gallery: spine/resume-other-config).
"""

import contextlib
import inspect
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm

from common.data.problems import Problem
from common.evaluation.task import Strategy, Task, describe
from common.foundation.code import code_hashes
from common.foundation.files import append_json_line, read_json_lines, set_aside, sha256_json
from common.foundation.statistics import Interval, mean_ci

COSTS = ("prompt_tokens", "generated_tokens", "seconds")
Trace = dict[str, Any]  # one line of a trace file; its keys are listed in `_trace`


@dataclass(frozen=True)
class Report:
    """Accuracy over all problems, an unreadable answer counting as not right, and the three-way count behind it."""

    accuracy: Interval
    correct: int
    wrong: int
    unparsed: int
    cost: dict[str, float]
    traces: list[Trace]

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens together."""
        return int(self.cost["prompt_tokens"] + self.cost["generated_tokens"])

    def right(self) -> list[float]:
        """1.0 for each problem that was solved, 0.0 for each other: what a paired comparison takes."""
        return [float(trace["correct"] is True) for trace in self.traces]

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy} on {self.accuracy.n:,} problems "
            f"({self.correct:,} right, {self.wrong:,} wrong, {self.unparsed:,} unreadable), "
            f"{self.tokens:,} tokens"
        )


def evaluate(
    task: Task,
    strategy: Strategy,
    engine: Any,
    n: int | None = None,
    *,
    split: str = "test",
    seed: int = 0,
    trace_path: str | Path | None = None,
    resume: bool = True,
    chunk: int = 512,
) -> Report:
    """Solve and grade `n` problems of a split (all of them for None).

    Args:
        engine: handed to the strategy; None for strategies that use no model.
        trace_path: where the traces go; None keeps them in memory only.
        resume: continue a trace file of the same evaluation. False sets an existing file aside and starts anew.
        chunk: problems between two writes; a kill loses at most these.
    Raises:
        ValueError: the trace file belongs to another evaluation; the message says what differs.
    """
    problems = task.problems(split, n, seed)
    if trace_path is not None:
        Path(trace_path).parent.mkdir(parents=True, exist_ok=True)
    lock = (
        contextlib.nullcontext()
        if trace_path is None
        else filelock.FileLock(f"{os.fspath(trace_path)}.lock", timeout=0)
    )
    try:
        with lock:
            return _evaluate(task, strategy, engine, problems, split, trace_path, resume, chunk)
    except filelock.Timeout:
        raise RuntimeError(
            f"{os.fspath(trace_path)} is being written by another evaluation: wait, or use another file"
        ) from None


def _evaluate(
    task: Task,
    strategy: Strategy,
    engine: Any,
    problems: Sequence[Problem],
    split: str,
    trace_path: str | Path | None,
    resume: bool,
    chunk: int,
) -> Report:
    header = evaluation_identity(task, strategy, engine, split)
    done: dict[str, Trace] = {}
    if trace_path is not None:
        if not resume and Path(trace_path).exists():
            set_aside(trace_path)
        # Graded again: the answers are kept, the verdict is today's.
        done = {trace["problem"]: trace for trace in regrade(task, _resume(Path(trace_path), header)).traces}
    waiting = [problem for problem in problems if problem.name not in done]
    bar = tqdm(total=len(waiting), desc=f"{task.name}, {strategy.name}", unit="problem", delay=5)
    for first in range(0, len(waiting), chunk):
        batch = waiting[first : first + chunk]
        start = time.perf_counter()
        solutions = strategy.solve(batch, engine)
        if len(solutions) != len(batch):
            raise ValueError(
                f"strategy {strategy.name!r} returned {len(solutions)} solutions for {len(batch)} problems"
            )
        seconds = (time.perf_counter() - start) / len(batch)
        traces = [_trace(task, p, s, seconds) for p, s in zip(batch, solutions, strict=True)]
        if trace_path is not None:
            append_json_line(trace_path, *traces)
        done.update((trace["problem"], trace) for trace in traces)
        bar.update(len(batch))
    bar.close()
    return report([done[problem.name] for problem in problems])


def evaluation_identity(task: Task, strategy: Strategy, engine: Any, split: str) -> dict[str, Any]:
    """What an evaluation is an evaluation of. Equal identities: the answers are interchangeable."""
    return {
        **({"model": None, "tokenizer": None} if engine is None else engine.identity()),
        "task": describe(task),
        "strategy": describe(strategy),
        "split": split,
        "code": _code_of(strategy),
    }


def _code_of(strategy: Strategy) -> str | None:
    """The hash of the code that a strategy reaches; None for one that was defined in a notebook."""
    try:
        return sha256_json(code_hashes(inspect.getfile(type(strategy))))
    except (TypeError, OSError):
        return None


def _resume(path: Path, header: dict[str, Any]) -> list[Trace]:
    lines = read_json_lines(path, repair=True)
    if not lines:
        append_json_line(path, header)
        return []
    if lines[0] != header:
        found = lines[0] if isinstance(lines[0], dict) else {}
        differing = [name for name in header if found.get(name) != header[name]]
        raise ValueError(
            f"{os.fspath(path)} belongs to another evaluation ({', '.join(differing)} differ): "
            "give another trace_path, or resume=False to set it aside"
        )
    return lines[1:]


def _trace(task: Task, problem: Problem, solution: Any, seconds: float) -> Trace:
    graded = task.grade(problem, solution.answer)
    return {
        "problem": problem.name,
        "index": problem.index,
        "question": problem.question,
        "gold": problem.answer,
        "answer": solution.answer,
        "steps": [asdict(step) for step in solution.steps],
        **graded._asdict(),
        "cost": solution.cost,
        "seconds": seconds,
    }


def read_traces(path: str | Path) -> list[Trace]:
    """The traces of a whole file, without the header. Raises ValueError if the file was cut off."""
    return read_json_lines(path)[1:]


def trace_text(trace: Trace) -> str:
    """A trace for people: the question, each step as it was asked and answered, and the verdict."""
    steps = [f"  {step['prompt']} -> {step['text']}" for step in trace["steps"]]
    said = {True: "right", False: "wrong", None: "unreadable"}[trace["correct"]]
    return "\n".join([trace["question"], *steps, f"answer {trace['answer']}: {said} ({trace['reason']})"])


def regrade(task: Task, traces: Sequence[Trace]) -> Report:
    """Grade the same texts again, with another rule or grader: the model is not asked again.

    The way to tell a better measurement from a better model.
    """
    again = []
    for trace in traces:
        problem = Problem(trace["problem"], trace["index"], trace["question"], trace["gold"])
        again.append({**trace, **task.grade(problem, trace["answer"])._asdict()})
    return report(again)


def report(traces: Sequence[Trace]) -> Report:
    """Count and bill the traces of one evaluation."""
    if not traces:
        return Report(Interval(0.0, 0.0, 1.0, 0, "none"), 0, 0, 0, dict.fromkeys(COSTS, 0), [])
    verdicts = [trace["correct"] for trace in traces]
    cost = {name: sum(t["cost"][name] for t in traces) for name in COSTS}
    return Report(
        accuracy=mean_ci([float(verdict is True) for verdict in verdicts]),
        correct=sum(verdict is True for verdict in verdicts),
        wrong=sum(verdict is False for verdict in verdicts),
        unparsed=sum(verdict is None for verdict in verdicts),
        cost=cost,
        traces=list(traces),
    )
