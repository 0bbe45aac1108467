import pytest

from common.data.problems import Problem, column_facts, solved_documents
from common.evaluation.runner import evaluate
from common.evaluation.task import Addition, describe
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.ngram import NGram
from common.reasoning.strategies import Ask, Columns


@pytest.fixture(scope="module")
def fact_engine(tokenizer):
    return Engine(NGram.fit_documents(solved_documents(column_facts(), reverse_answer=True), tokenizer, 9), tokenizer)


@pytest.mark.parametrize(
    ("question", "answer"), [("47+38=", "085"), ("99+99=", "198"), ("0+0=", "00"), ("5+95=", "100"), ("123+9=", "0132")]
)
def test_columns_adds_as_on_paper(fact_engine, question, answer):
    (solution,) = Columns().solve([Problem("p", 0, question, "")], fact_engine)
    assert solution.answer == answer


def test_columns_shows_each_step_and_its_cost(fact_engine):
    (solution,) = Columns().solve([Problem("p", 0, "47+38=", "")], fact_engine)
    assert [(step.prompt, step.text) for step in solution.steps] == [("7+8+0=", "51"), ("4+3+1=", "80")]
    assert solution.cost["prompt_tokens"] == 14
    assert solution.cost["generated_tokens"] == 6
    assert all(step.logprob < 0 for step in solution.steps)


def test_columns_on_problems_of_different_length(fact_engine):
    problems = [Problem("a", 0, "7+8=", ""), Problem("b", 1, "123+456=", ""), Problem("c", 2, "3+4=", "")]
    together = Columns().solve(problems, fact_engine)
    assert [s.answer for s in together] == ["15", "0579", "07"]
    assert [s.answer for s in together] == [Columns().solve([p], fact_engine)[0].answer for p in problems]
    assert [len(s.steps) for s in together] == [1, 3, 1]


def test_columns_draws_new_numbers_for_each_column_and_the_same_in_any_batch(fact_engine):
    warm = Columns(SamplingParams(temperature=3.0, max_tokens=4))
    problems = [Problem(str(i), i, "11+11=", "") for i in range(60)]
    together = warm.solve(problems, fact_engine)
    assert together[40].answer == warm.solve([problems[40]], fact_engine)[0].answer
    same_prompt = [s.steps for s in together if s.steps[0].prompt == s.steps[1].prompt]
    assert any(first.text != second.text for first, second in same_prompt), "the columns share their random numbers"


def test_more_than_one_sample_is_refused(fact_engine):
    with pytest.raises(ValueError, match="n=8"):
        Columns(SamplingParams(n=8)).solve([Problem("p", 0, "1+1=", "")], fact_engine)


def test_columns_survives_a_model_that_talks_nonsense(adder):
    (solution,) = Columns().solve([Problem("p", 0, "47+38=", "")], adder)
    assert len(solution.steps) == 2
    assert solution.answer[0].isdecimal(), "a carry that is no digit counts as none"


def test_without_knowledge_the_procedure_is_worth_nothing(tokenizer):
    facts = solved_documents(column_facts(), reverse_answer=True, shuffle_answers=1)
    engine = Engine(NGram.fit_documents(facts, tokenizer, 9), tokenizer)
    assert evaluate(Addition(), Columns(), engine, 200).accuracy.high < 0.1


def test_ask_seeds_by_the_problem_and_not_by_its_place(adder):
    task = Addition(digits=1)
    ask = Ask(task, SamplingParams(temperature=1.5, max_tokens=6))
    problems = task.problems("train", 12, 0)
    together = ask.solve(problems, adder)
    alone = [ask.solve([problem], adder)[0] for problem in problems]
    assert [s.answer for s in together] == [s.answer for s in alone]


def test_a_strategy_is_described_by_its_fields():
    first, second = Ask(Addition()), Ask(Addition(rule="last_digit"))
    assert describe(first) == describe(Ask(Addition())) != describe(second)
    assert describe(first)["params"]["temperature"] == 0
