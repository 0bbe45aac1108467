import collections

import pytest

from common.data.problems import addition_problems, column_facts, solved_documents
from common.data.split import hash_split


def test_split_depends_on_the_key_alone_and_keeps_its_shares():
    counts = collections.Counter(hash_split(f"item {i}") for i in range(20_000))
    assert counts["train"] / 20_000 == pytest.approx(0.8, abs=0.01)
    assert counts["test"] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert hash_split("hamlet") == hash_split("hamlet")
    assert {hash_split("hamlet", salt=str(i)) for i in range(50)} == {"train", "validation", "test"}


def test_fractions_must_add_up():
    with pytest.raises(ValueError, match="add up to 1"):
        hash_split("x", {"train": 0.5, "test": 0.6})


@pytest.mark.parametrize("digits", [1, 2])
def test_sums_are_partitioned_and_order_of_numbers_does_not_matter(digits):
    splits = {name: addition_problems(digits, name) for name in ("train", "validation", "test")}
    names = [problem.name for problems in splits.values() for problem in problems]
    assert len(names) == len(set(names)) == 100**digits
    for problems in splits.values():
        there = {problem.name for problem in problems}
        assert all("+".join(reversed(name.split("+"))) in there for name in there)
        for problem in problems:
            a, b = map(int, problem.name.split("+"))
            assert problem.answer == str(a + b)
            assert problem.question == f"{problem.name}="
    indices = [problem.index for problems in splits.values() for problem in problems]
    assert len(set(indices)) == len(indices), "each problem has a number of its own"


def test_unknown_split():
    with pytest.raises(ValueError, match="split 'tset' is unknown"):
        addition_problems(1, "tset")


def test_column_facts_are_all_sums_of_two_digits_and_a_carry():
    facts = column_facts()
    assert len({fact.name for fact in facts}) == len({fact.index for fact in facts}) == 200
    assert all(int(fact.answer) == sum(map(int, fact.name.split("+"))) for fact in facts)


def test_solved_documents():
    facts = column_facts()
    forward, backward = solved_documents(facts), solved_documents(facts, reverse_answer=True)
    assert forward[199].text == "9+9+1=19"
    assert backward[199].text == "9+9+1=91"
    shuffled = solved_documents(facts, shuffle_answers=0)
    assert sorted(d.text.split("=")[1] for d in shuffled) == sorted(d.text.split("=")[1] for d in forward)
    assert sum(a.text == b.text for a, b in zip(shuffled, forward, strict=True)) < 40
