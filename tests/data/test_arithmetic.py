"""Procedural arithmetic: every drawn trace is valid, every touched one is not, and nothing crosses a split."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.arithmetic import (
    FAMILIES,
    Verdict,
    check_trace,
    drill_documents,
    problems,
    trace,
    training_documents,
    with_small_digits,
    worked,
)
from common.data.documents import Document
from common.data.problems import Problem
from common.data.split import FRACTIONS, hash_split

families = st.sampled_from(list(FAMILIES))
styles = st.sampled_from(["plain", "sentence"])
seeds = st.integers(0, 10**6)
SMALL = {"checksum": [3, 4, 5, 6]}  # listing the longest checksums takes a second


def draw(family, seed=0, n=1, split="train", style="plain"):
    return problems(family, split, n, seed, sizes=SMALL.get(family), style=style)


def completion(problem, seed=0):
    """What a perfect model would write after the question."""
    text = worked(problem.question, trace(problem, np.random.default_rng(seed)), problem.answer)
    assert text.startswith(problem.question + "\n")
    return text[len(problem.question) + 1 :]


def read(family, question):
    """The terms of a question in either style, read as a person would: ['3', '+4', '*7', '-2'] or ['47', '16', '82']."""
    text = question.replace("modulo 10", "")
    if family != "mod_chain":
        return re.findall(r"\d+", text)
    for verb, sign in (("add ", "+"), ("subtract ", "-"), ("multiply by ", "*")):
        text = text.replace(verb, sign)
    return re.findall(r"[+*-]?\d+", text)


def dial(terms):
    """A remainder taken once at the end equals one taken after every step."""
    start, *rest = terms
    return eval("(" * len(rest) + start + "".join(f"{term})" for term in rest)) % 10


def key(terms):
    """Written out again, as documented: sorted numbers, or the four terms that a chain comes down to."""
    if all(term.isdigit() for term in terms):
        return " ".join(map(str, sorted(map(int, terms))))
    return " ".join([str(dial(terms[:-3])), *terms[-3:]])


def form(terms):
    """What makes two problems the same: the numbers of a list in any order, a chain as it stands."""
    return tuple(sorted(terms) if all(term.isdigit() for term in terms) else terms)


def passed(document):
    """What a document states and what is left after each of its steps, as terms, while it is as long as a problem."""
    question, *lines, last = document.text.split("\n")
    assert last.startswith("answer ")
    smallest = 4 if document.group == "mod_chain" else 3
    lists = [read(document.group, question), *(line.split("; ")[1].split(" ") for line in lines)]
    return [terms for terms in lists if len(terms) >= smallest]


def independent_answer(problem):
    terms = read(problem.family, problem.question)
    if problem.family == "mod_chain":
        return dial(terms)
    return sum(map(int, terms)) % (10 if problem.family == "checksum" else 10**9)


@settings(max_examples=150, deadline=None)
@given(families, st.sampled_from(list(FRACTIONS)), styles, seeds)
def test_a_drawn_trace_is_valid_and_its_answer_is_right(family, split, style, seed):
    for problem in draw(family, seed, 3, split, style):
        text = completion(problem, seed)
        assert check_trace(problem, text) == (True, None, "valid", int(problem.answer))
        assert check_trace(problem, text + "\n").ok
        assert text.count("\n") == (0 if family == "plain_sum" else len(problem.numbers) - 1)
        assert independent_answer(problem) == int(problem.answer)
        assert 0 <= problem.index < 2**62


@settings(max_examples=150, deadline=None)
@given(families, seeds, st.data())
def test_one_changed_digit_anywhere_is_found_in_its_line(family, seed, data):
    (problem,) = draw(family, seed)
    text = completion(problem, seed)
    for place in [i for i, character in enumerate(text) if character.isdigit()]:
        other = data.draw(st.sampled_from([d for d in "0123456789" if d != text[place]]))
        verdict = check_trace(problem, text[:place] + other + text[place + 1 :])
        assert not verdict.ok
        assert verdict.line == text[:place].count("\n")


@settings(max_examples=60, deadline=None)
@given(families, seeds)
def test_a_line_left_out_doubled_or_appended_is_found(family, seed):
    (problem,) = draw(family, seed)
    lines = completion(problem, seed).split("\n")
    for i in range(len(lines)):
        assert not check_trace(problem, "\n".join(lines[:i] + lines[i + 1 :])).ok
        assert not check_trace(problem, "\n".join(lines[: i + 1] + lines[i:])).ok
        cut = check_trace(problem, "\n".join([*lines[:i], ""]))
        assert not cut.ok
    assert check_trace(problem, "\n".join([*lines, "and so on"])).line == len(lines)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["sums", "checksum"]), seeds, st.randoms())
def test_every_path_in_every_order_is_valid(family, seed, random):
    """A second writer of traces, which also turns the pair and the list around."""
    (problem,) = draw(family, seed)
    present, lines = list(problem.numbers), []
    while len(present) > 1:
        random.shuffle(present)
        a, b = present.pop(), present.pop()
        present.append((a + b) % 10 if family == "checksum" else a + b)
        result = present[-1]
        random.shuffle(present)
        lines.append(f"{a}+{b}={result}; {' '.join(map(str, present))}")
    assert check_trace(problem, "\n".join([*lines, f"answer {problem.answer}"])).ok


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("47+83=130; 16 130\n16+130=146; 146\nanswer 146", 0, "does not add two of the numbers 47 16 82"),
        ("47+47=94; 16 82 94\n16+82=98; 94 98\nanswer 192", 0, "does not add two"),  # a number present only once
        ("47*82=129; 16 129\n16+129=145; 145\nanswer 145", 0, "does not add two"),
        ("47+82=129; 129\nanswer 129", 0, "what is left is 16 129"),
        ("47+82=129; 16 16 129\n16+129=145; 145\nanswer 145", 0, "what is left is 16 129"),
        ("47+82=129; 16 129\n47+16=63; 63\nanswer 145", 1, "does not add two of the numbers 16 129"),
        ("47+82=129; 16 129\n16+129=145; 145\nanswer 146", 2, "this line must be 'answer 145'"),
        ("47+82=129; 16 129\n16+129=145; 145\n", 2, "ends after 2 of 2 steps"),
        ("47+82=129; 16 129\nanswer 145", 1, "not a line such as"),
        ("answer 145", 0, "not a line such as"),
        ("", 0, "not a line such as"),
    ],
)
def test_what_is_wrong_is_named(text, line, reason):
    verdict = check_trace(Problem("add 47 16 82", 0, "", "145"), text)
    assert (verdict.ok, verdict.line) == (False, line)
    assert reason in verdict.reason


def test_a_chain_has_one_path():
    problem = Problem("chain 3 +4 *7 -2", 0, "", "7")
    assert trace(problem, np.random.default_rng(0)) == "3+4=7; 7 *7 -2\n7*7=9; 9 -2\n9-2=7; 7\n"
    swapped = check_trace(problem, "3+4=7; 7 -2 *7\n7-2=5; 5 *7\n5*7=5; 5\nanswer 5")
    assert (swapped.ok, swapped.line, swapped.reason) == (False, 0, "what is left is 7 *7 -2")
    assert check_trace(problem, "4+3=7; 7 *7 -2").reason == "the next step is 3+4, not 4+3"
    below = Problem("chain 2 -5 +0 +0", 0, "", "7")
    assert completion(below).startswith("2-5=7; 7 +0 +0\n")


GARBAGE = [
    "\x00",
    "٤٧+٨٢=١٢٩; ١٦ ١٢٩",
    "answer ²",
    "9" * 5000,
    f"47+82={'9' * 9999}; 16",
    "\ud800",
    "\r\n",
    "47+82=129;",
]


@settings(max_examples=200, deadline=None)
@given(families, st.one_of(st.text(), st.sampled_from(GARBAGE), st.from_regex(r"\A[0-9+*=; answer\n-]{0,60}\Z")))
def test_any_text_gets_a_verdict(family, text):
    (problem,) = draw(family)
    for attempt in (text, completion(problem) + text, f"{text}\n{completion(problem)}"):
        verdict = check_trace(problem, attempt)
        assert isinstance(verdict, Verdict)
        assert verdict.ok == (attempt.removesuffix("\n") == completion(problem)) or family in ("sums", "checksum")


@given(st.text())
def test_any_problem_gets_a_verdict(name):
    assert not check_trace(Problem(name, 0, "", ""), "answer 1").ok
    for head in ("add ", "chain ", "sum "):
        assert check_trace(Problem(head + name, 0, "", ""), "answer -1").answer is None


def test_unicode_digits_and_leading_zeros_are_not_numbers():
    problem = Problem("sum 7 21 3", 0, "", "31")
    assert check_trace(problem, "answer 31").ok
    for text in (
        "answer 031",
        "answer ٣١",
        "answer 31 ",
        "answer 3_1",
        "answer +31",
        "Answer 31",
        "answer " + "3" * 5000,
    ):
        assert check_trace(problem, text)[:2] == (False, 0)


@settings(max_examples=100, deadline=None)
@given(families, seeds, st.randoms())
def test_the_split_goes_by_the_documented_key_in_any_order(family, seed, random):
    kind = FAMILIES[family]
    terms = kind.draw(kind.sizes[-1], np.random.default_rng(seed))
    shuffled = list(terms)
    random.shuffle(shuffled)
    if not kind.chain:
        assert kind.key(tuple(shuffled)) == kind.key(terms)
    assert kind.key(terms) == key(terms)
    assert kind.split(terms) == hash_split(key(terms))


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_problem_and_documents_stay_in_theirs(family):
    numbers = {}
    for split in FRACTIONS:
        asked = draw(family, 0, 25 if family == "checksum" else 400, split) + draw(family, 1, 300, split, "sentence")
        posed = {key(read(family, problem.question)) for problem in asked}
        for document in training_documents(split, 3000, 0, families={family: 1}):
            posed.add(key(passed(document)[0]))
        numbers[split] = posed
    assert not numbers["train"] & numbers["validation"]
    assert not numbers["train"] & numbers["test"]
    assert not numbers["validation"] & numbers["test"]
    for split, posed in numbers.items():
        assert len(posed) > 300
        assert all(hash_split(k) == split for k in posed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("styles", [0, 1])
def test_all_that_a_training_document_passes_through_is_in_train(family, styles):
    lists = [passed(document) for document in training_documents("train", 5000, 7, families={family: 1}, styles=styles)]
    assert all(hash_split(key(terms)) == "train" for document in lists for terms in document)
    longest = {"sums": 6, "checksum": 8, "mod_chain": 6, "plain_sum": 1}[family]
    assert {len(document) for document in lists} == set(range(1, longest + 1))


def held_out(split):
    """Posed problems of all families; small spaces as a whole, or nearly."""
    found = problems("checksum", split, 270, 0, sizes=[3, 4, 5]) + problems("plain_sum", split, 450, 0)
    for family, size in (("sums", 3), ("mod_chain", 4), ("sums", 4), ("mod_chain", 5)):
        found += problems(family, split, 4000, 0, sizes=[size])
    return {form(problem.name.split(" ")[1:]) for problem in found}


def test_no_problem_of_another_split_is_solved_in_passing():
    """Without keys: what is asked elsewhere, in whatever family, does not occur. Traces of evaluation do meet it."""
    elsewhere = held_out("validation") | held_out("test")
    documents = training_documents("train", 20_000, 1)
    assert not elsewhere & {form(terms) for document in documents for terms in passed(document)}
    rng = np.random.default_rng(0)
    for family, sizes in (("sums", [4]), ("checksum", [4, 5])):
        for training in (True, False):
            found = set()
            for problem in problems(family, "train", 1500, 2, sizes=sizes):
                if (text := trace(problem, rng, training=training)) is not None:
                    document = Document("", family, worked(problem.question, text, problem.answer))
                    found |= {form(terms) for terms in passed(document)}
            assert bool(elsewhere & found) == (not training)


def after(problem):
    """First step of a sums or checksum problem -> whether what it leaves is in train."""
    left = {}
    for i, j in itertools.combinations(range(len(problem.numbers)), 2):
        a, b = problem.numbers[i], problem.numbers[j]
        others = [n for place, n in enumerate(problem.numbers) if place not in (i, j)]
        result = (a + b) % 10 if problem.family == "checksum" else a + b
        left[f"{a}+{b}"] = hash_split(key([str(n) for n in (*others, result)])) == "train"
    return left


def test_the_rule_leaves_the_paths_nearly_as_they_are():
    """It takes away about as many steps as are held out, evenly: by place, every pair stays equally likely."""
    for family, sizes in (("sums", [4, 5, 6, 7, 8]), ("checksum", [5, 6])):
        shares = [np.mean([*after(problem).values()]) for problem in problems(family, "train", 1500, 0, sizes=sizes)]
        assert np.mean(shares) == pytest.approx(0.8, abs=0.03)
    places = []
    for document in training_documents("train", 25_000, 0, families={"sums": 1}, styles=0):
        question, first, *_ = document.text.split("\n")
        numbers = question.split(" ")[1:]
        if len(numbers) == len(set(numbers)) == 5:
            places.append(tuple(numbers.index(n) for n in first.split("=")[0].split("+")))
    for pair in itertools.combinations(range(5), 2):
        assert places.count(pair) / len(places) == pytest.approx(0.1, abs=0.02)


def test_training_traces_pick_evenly_among_the_steps_that_stay_in_train():
    problem = next(p for p in problems("sums", "train", 500, 0, sizes=[4]) if 3 <= sum(after(p).values()) <= 4)
    allowed = after(problem)
    rng = np.random.default_rng(0)
    firsts = [trace(problem, rng, training=True).split("=")[0] for _ in range(3000)]
    for pair, stays in allowed.items():
        assert firsts.count(pair) / 3000 == pytest.approx(stays / sum(allowed.values()), abs=0.04)


def test_a_training_trace_is_of_a_train_problem_and_may_not_exist():
    rng = np.random.default_rng(0)
    for family in FAMILIES:
        (problem,) = draw(family, split="test")
        with pytest.raises(ValueError, match=f"problem {re.escape(repr(problem.name))} is in test"):
            trace(problem, rng, training=True)
        assert check_trace(problem, completion(problem)).ok
    assert all(trace(problem, rng, training=True) for problem in draw("mod_chain", n=300))
    fours = problems("checksum", "train", 500, 0, sizes=[4])
    stuck = [problem for problem in fours if not any(after(problem).values())]
    assert stuck
    assert stuck == [problem for problem in fours if trace(problem, rng, training=True) is None]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sample_is_a_prefix_distinct_and_the_same_in_both_styles(family):
    many, few = draw(family, 3, 300), draw(family, 3, 17)
    assert many[:17] == few
    assert (
        len({form(problem.name.split(" ")[1:]) for problem in many}) == len({problem.index for problem in many}) == 300
    )
    assert draw(family, 4, 17) != few
    told = draw(family, 3, 300, style="sentence")
    assert [(p.numbers, p.answer) for p in told] == [(p.numbers, p.answer) for p in many]
    assert not {p.index for p in told} & {p.index for p in many}
    assert len({re.sub(r"\d+", "", p.question).split()[0] for p in told}) > 1, "more than one template"


def test_a_problem_keeps_its_index_and_its_name_tells_its_question():
    seen = {}
    for seed in range(30):
        for problem in draw("plain_sum", seed, 200, "test") + draw("plain_sum", seed, 200, "test", "sentence"):
            assert seen.setdefault(problem.name, problem) == problem
    assert len({problem.index for problem in seen.values()}) == len({p.question for p in seen.values()}) == len(seen)


def test_small_spaces_can_be_used_up_and_no_further():
    total = 0
    for split in FRACTIONS:
        available = sum(
            hash_split(f"{a} {b} {c}") == split for a in range(1, 31) for b in range(a, 31) for c in range(b, 31)
        )
        assert len(problems("plain_sum", split, available, 0)) == available
        with pytest.raises(ValueError, match=f"has {available} {split} problems"):
            problems("plain_sum", split, available + 1, 0)
        total += available
    assert total == math.comb(32, 3)


@pytest.mark.parametrize("listed", [0, 150_000])
def test_an_order_of_the_same_numbers_is_no_new_problem(monkeypatch, listed):
    monkeypatch.setattr("common.data.arithmetic.LISTED", listed)
    threes = [[str(n) for n in numbers] for numbers in itertools.combinations_with_replacement(range(10), 3)]
    available = {form(numbers) for numbers in threes if hash_split(key(numbers)) == "test"}
    found = problems("checksum", "test", len(available), 0, sizes=[3])
    assert {form(problem.name.split(" ")[1:]) for problem in found} == available
    with pytest.raises(ValueError, match=f"has {len(available)} test problems"):
        problems("checksum", "test", len(available) + 1, 0, sizes=[3])


def test_a_listed_space_is_drawn_like_a_sampled_one():
    """Digits drawn one by one repeat less often than a uniform choice among the listed checksums would (0.45)."""
    firsts = [problems("checksum", "train", 1, seed, sizes=[3])[0].numbers for seed in range(1500)]
    rng = np.random.default_rng(0)
    kind = FAMILIES["checksum"]
    drawn = [kind.draw(3, rng) for _ in range(6000)]
    drawn = [terms for terms in drawn if hash_split(kind.key(terms)) == "train"]
    repeats = [sum(len(set(numbers)) < 3 for numbers in some) / len(some) for some in (firsts, drawn)]
    assert repeats[0] == pytest.approx(repeats[1], abs=0.04)


def test_a_used_up_size_gives_way_to_the_others():
    sizes = [len(p.numbers) for p in problems("checksum", "test", 90, 0, sizes=(3, 4))]
    assert set(sizes[:20]) == {3, 4}
    assert set(sizes[60:]) == {4}


def test_errors_name_the_field():
    for family, split, n, extra, message in (
        ("product", "test", 1, {}, "family 'product' is unknown"),
        ("sums", "tset", 1, {}, "split 'tset' is unknown"),
        ("sums", "test", 1, {"style": "rhyme"}, "style 'rhyme' is unknown"),
        ("sums", "test", 1, {"sizes": (2, 3)}, r"sizes \(2, 3\) are impossible: sums has 3 to 8 numbers"),
        ("sums", "test", 1, {"sizes": ()}, "sizes"),
        ("sums", "test", -1, {}, "n must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            problems(family, split, n, 0, **extra)
    for split, extra, message in (
        ("tset", {}, "split 'tset'"),
        ("train", {"families": {"product": 1}}, "family 'product'"),
        ("train", {"families": {}}, "families must have weights"),
        ("train", {"families": {"sums": -1, "checksum": 2}}, "families must have weights"),
        ("train", {"families": {"sums": 0}}, "families must have weights"),
        ("train", {"styles": 1.5}, "styles must lie between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            training_documents(split, 1, 0, **extra)
    with pytest.raises(ValueError, match="'47[+]38' is not one of"):
        trace(Problem("47+38", 0, "", ""), np.random.default_rng(0))


def test_documents_are_a_function_of_their_seed_and_every_trace_in_them_is_valid():
    documents = training_documents("train", 2000, 5)
    assert documents == training_documents("train", 2000, 5)
    assert documents[:100] == training_documents("train", 100, 5)
    assert documents[0].text != training_documents("train", 1, 6)[0].text
    assert len({document.name for document in documents}) == 2000
    plain = 0
    for document in documents:
        question, text = document.text.split("\n", 1)
        if question.split()[0] in ("add", "checksum", "chain", "sum"):
            plain += 1
            verdict = check_trace(Problem(question, 0, question, ""), text)
            assert verdict.ok, (document, verdict)
    assert plain / 2000 == pytest.approx(0.75, abs=0.04)


def test_weights_and_styles_are_kept():
    documents = training_documents("validation", 3000, 0, families={"sums": 3, "plain_sum": 1, "checksum": 0}, styles=1)
    groups = [document.group for document in documents]
    assert groups.count("sums") / 3000 == pytest.approx(0.75, abs=0.03)
    assert set(groups) == {"sums", "plain_sum"}
    assert not any(document.text.startswith(("add ", "sum ")) for document in documents)


def test_pairs_are_picked_evenly():
    problem = Problem("add 11 22 44", 0, "", "77")
    rng = np.random.default_rng(0)
    firsts = [trace(problem, rng).split("=")[0] for _ in range(3000)]
    for pair in ("11+22", "11+44", "22+44"):
        assert firsts.count(pair) / 3000 == pytest.approx(1 / 3, abs=0.04)


def test_drills_are_right_varied_and_no_problem_of_a_family():
    documents = drill_documents(300, seed=3)
    lines = [line for document in documents for line in document.text.splitlines()]
    parts = [re.fullmatch(r"(\d+)\+(\d+)=(\d+)", line) for line in lines]
    assert all(int(p[1]) + int(p[2]) == int(p[3]) for p in parts)
    assert len(set(lines)) > 0.8 * len(lines)
    assert {len(p[3]) for p in parts} == {2, 3}
    assert drill_documents(300, seed=3) == documents
    assert drill_documents(100, seed=3) == documents[:100]
    assert drill_documents(1, seed=4) != documents[:1]
    assert len({document.name for document in documents}) == 300
    assert min(size for family in FAMILIES.values() for size in family.sizes) > 2


def digits_after_the_first(documents):
    numbers = [n for d in documents for line in d.text.splitlines() for n in re.split(r"[+]", line.split("=")[0])]
    return [digit for number in numbers for digit in number[1:]]


def test_skewed_drills_have_small_digits_after_the_first_and_uniform_ones_do_not():
    for skewed, zeros, nines in ((1.0, 0.341, 0.034), (0.0, 0.1, 0.1), (0.5, 0.22, 0.067)):
        drawn = digits_after_the_first(drill_documents(1000, seed=0, skewed=skewed))
        assert drawn.count("0") / len(drawn) == pytest.approx(zeros, abs=0.015)
        assert drawn.count("9") / len(drawn) == pytest.approx(nines, abs=0.015)


def test_with_small_digits_first_digit_and_length_stay():
    numbers = np.random.default_rng(0).integers(10, 700, 2000)
    drawn = with_small_digits(numbers, np.random.default_rng(1))
    assert all(str(a)[0] == str(b)[0] and len(str(a)) == len(str(b)) for a, b in zip(numbers, drawn, strict=True))
    assert (numbers != drawn).mean() > 0.5


def test_the_pairs_of_a_split_are_in_no_other_split():
    pairs = {}
    for split in ("train", "validation", "test"):
        lines = [line for d in drill_documents(400, 0, split=split) for line in d.text.splitlines()]
        pairs[split] = {tuple(sorted(line.split("=")[0].split("+"))) for line in lines}
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["train"] & pairs["test"]
    with pytest.raises(ValueError, match="split"):
        drill_documents(1, 0, split="exam")
