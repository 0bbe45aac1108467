"""Evaluation end to end: pairing, three-way counts, traces, resuming, refusing."""

import dataclasses
import functools
import json

import filelock
import pytest

from common.evaluation.runner import evaluate, read_traces, regrade, trace_text
from common.evaluation.task import Addition, describe
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.reasoning.strategies import Ask, Scripted

TASK = Addition(digits=1)
WARM = Ask(TASK, SamplingParams(temperature=1.0, max_tokens=4, seed=3))


def right(problem):
    return problem.answer


def test_oracle_scores_one_and_nothing_scores_zero():
    assert evaluate(Addition(), Scripted("oracle", right), None, 80).accuracy.mean == 1.0
    nothing = evaluate(Addition(), Scripted("nothing", lambda problem: ""), None, 80)
    assert (nothing.correct, nothing.wrong, nothing.unparsed) == (0, 0, 80)
    assert nothing.accuracy.mean == 0.0


def test_reversed_answers_are_read_backwards():
    task = Addition(answer_order="reversed")
    assert evaluate(task, Scripted("oracle", lambda problem: problem.answer[::-1]), None, 50).accuracy.mean == 1.0


def test_seen_sums_are_right_and_the_report_says_what_it_cost(adder):
    report = evaluate(TASK, Ask(TASK), adder, split="train")
    assert report.accuracy.mean == 1.0
    assert report.tokens == sum(len(t["question"]) + 1 + len(t["answer"]) + 1 for t in report.traces)
    assert f"{report.accuracy.n} problems" in str(report)


def test_problems_are_a_prefix_of_one_order():
    few, many = TASK.problems("train", 10, 4), TASK.problems("train", 30, 4)
    assert few == many[:10]
    assert len({problem.name for problem in many}) == 30
    with pytest.raises(ValueError, match=r"has \d+ test problems, not 500"):
        TASK.problems("test", 500, 0)


@pytest.mark.parametrize("done", [1, 7, 20])
def test_a_resumed_evaluation_equals_an_undisturbed_one(adder, tmp_path, done):
    whole = evaluate(TASK, WARM, adder, 30, split="train", trace_path=tmp_path / "whole", chunk=4)
    evaluate(TASK, WARM, adder, done, split="train", trace_path=tmp_path / "half")
    with open(tmp_path / "half", "a") as file:  # killed within a write
        file.write('{"answer": "1')
    resumed = evaluate(TASK, WARM, adder, 30, split="train", trace_path=tmp_path / "half", chunk=4)
    assert [t["answer"] for t in resumed.traces] == [t["answer"] for t in whole.traces]
    assert resumed.accuracy == whole.accuracy
    assert len(read_traces(tmp_path / "half")) == 30


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": Addition(digits=1, rule="last_number")}, "task"),
        ({"strategy": Ask(TASK, SamplingParams(temperature=0.5, max_tokens=4))}, "strategy"),
        ({"split": "test"}, "split"),
        ({"strategy": Scripted("oracle", right), "engine": None}, "model, tokenizer, strategy"),
    ],
)
def test_the_traces_of_another_evaluation_are_refused(adder, tmp_path, change, named):
    path = tmp_path / "traces.jsonl"
    first = {"task": TASK, "strategy": WARM, "engine": adder, "split": "train"}
    evaluate(**first, n=5, trace_path=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"another evaluation \\({named} differ\\)"):
        evaluate(**{**first, **change}, n=5, trace_path=path)
    assert path.read_bytes() == before
    evaluate(**{**first, **change}, n=5, trace_path=path, resume=False)
    assert (tmp_path / "traces.jsonl.1").read_bytes() == before, "set aside, not lost"


def test_kept_answers_are_not_asked_again_and_each_chunk_is_on_disk(adder, tmp_path):
    path, asked = tmp_path / "t.jsonl", []

    @dataclasses.dataclass(frozen=True)
    class Stops:
        after: int
        name: str = "stops"

        def solve(self, problems, engine):
            if len(asked) >= self.after:
                raise KeyboardInterrupt
            asked.extend(problem.name for problem in problems)
            return Scripted("x", right).solve(problems)

    with pytest.raises(KeyboardInterrupt):
        evaluate(TASK, Stops(8), adder, 20, split="train", trace_path=path, chunk=4)
    assert len(read_traces(path)) == 8, "killed, and two chunks are kept"
    asked.clear()
    with pytest.raises(ValueError, match="strategy"):
        evaluate(TASK, Stops(99), adder, 20, split="train", trace_path=path)
    first = evaluate(TASK, WARM, adder, 12, split="train", trace_path=tmp_path / "u", chunk=4)
    again = evaluate(TASK, WARM, adder, 12, split="train", trace_path=tmp_path / "u")
    assert [t["seconds"] for t in again.traces] == [t["seconds"] for t in first.traces], (
        "the same records, not new ones"
    )


def test_kept_answers_are_graded_by_todays_grader(adder, tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    evaluate(TASK, WARM, adder, 10, split="train", trace_path=path)
    monkeypatch.setattr("common.evaluation.task.grade", lambda *_, **__: (None, "withdrawn"))
    assert evaluate(TASK, WARM, adder, 10, split="train", trace_path=path).unparsed == 10


def test_another_model_is_another_evaluation(adder, tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    evaluate(TASK, WARM, adder, 5, split="train", trace_path=path)
    other = Engine(adder.model.truncated(3), tokenizer)
    with pytest.raises(ValueError, match=r"\(model, context_length differ\)"):
        evaluate(TASK, WARM, other, 5, split="train", trace_path=path)


def test_functions_are_told_apart_by_what_they_do():
    def always(text):
        return Scripted("s", lambda problem: text)

    assert describe(always("a")) != describe(always("b"))
    partials = [Scripted("s", functools.partial(max, text)) for text in "ab"]
    with pytest.raises(ValueError, match="cannot describe"):
        describe(partials[0])  # a built-in has no code to tell it by
    with pytest.raises(ValueError, match="cannot describe"):
        describe(Scripted("s", object()))


def test_two_writers_of_one_trace_file_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    with filelock.FileLock(f"{path}.lock"), pytest.raises(RuntimeError, match="being written"):
        evaluate(TASK, Scripted("oracle", right), None, 5, trace_path=path)


def test_regrading_changes_the_measurement_only(adder):
    asked = evaluate(Addition(), Scripted("ones", lambda p: "9" + p.answer[-1]), None, 60)
    lenient = regrade(Addition(rule="last_digit"), asked.traces)
    assert asked.accuracy.mean < 0.2
    assert lenient.accuracy.mean == 1.0
    assert [t["answer"] for t in lenient.traces] == [t["answer"] for t in asked.traces]


def test_a_strategy_that_loses_a_problem_is_an_error():
    @dataclasses.dataclass(frozen=True)
    class Loses:
        name: str = "loses"

        def solve(self, problems, engine):
            return Scripted("x", right).solve(problems[1:])

    with pytest.raises(ValueError, match="4 solutions for 5 problems"):
        evaluate(TASK, Loses(), None, 5)


def test_traces_are_json_and_readable(adder, tmp_path):
    path = tmp_path / "t.jsonl"
    evaluate(TASK, Ask(TASK), adder, 3, split="train", trace_path=path)
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(header) == {*adder.identity(), "task", "strategy", "split", "code"}
    assert len(lines) == 3
    assert trace_text(lines[0]).splitlines()[-1].endswith("right (equal as numbers)")


def test_random_guess_is_possible_and_repeatable():
    task = Addition(digits=2)
    guesses = [task.random_guess(problem) for problem in task.problems("test", 200)]
    assert guesses == [task.random_guess(problem) for problem in task.problems("test", 200)]
    assert all(0 <= int(guess) <= 198 for guess in guesses)
    assert len(set(guesses)) > 50
