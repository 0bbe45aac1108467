"""The comparison of notebooks, first as a function of two texts, then through pytest and a kernel."""

import os
import re
import subprocess
import sys
from decimal import Decimal

import nbformat
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.__main__ import NBVAL, ROOT
from tests.notebook_numbers import NUMBER, Tolerance, difference

WHY = "a training decides them"
LOOSE = Tolerance(WHY, relative=Decimal("0.02"), absolute=Decimal("0.005"), counts=2)


@pytest.mark.parametrize(
    ("made", "committed"),
    [
        ("loss 2.30", "loss 2.26"),  # 2 % of 2.26 is 0.045
        ("loss 0.012 nats", "loss 0.008 nats"),  # absolute
        ("[-0.001  0.5]", "[ 0.001  0.5]"),  # a sign takes the place of a blank
        ("1,002 tokens", "1,000 tokens"),  # a whole number, within counts
        ("1.01e-05", "1.00e-05"),
        ("5-gram of 10 -0.00", "5-gram of 12 0.00"),
        ("a    0.51\nb  -0.001", "a  0.51\nb  0.001"),
        ("1 of it", "0.999 of it"),  # as %g prints 1.0
    ],
)
def test_numbers_within_the_tolerance_agree(made, committed):
    assert difference(made, committed, LOOSE) is None


@pytest.mark.parametrize(
    ("made", "committed", "said"),
    [
        ("loss 2.31", "loss 2.26", "2.31 where 2.26 is committed, apart by 0.05; allowed is 0.0452"),
        ("one\nloss 2.31", "one\nloss 2.26", "line 2: 2.31 where 2.26"),
        ("1,003 tokens", "1,000 tokens", "1,003 where 1,000 is committed, apart by 3; allowed is 2 (counts 2)"),
        ("loss -2.26", "loss 2.26", "-2.26 where 2.26"),
        ("loss 2.26 nats", "loss 2.26 bits", "the words differ"),
        ("holds: False", "holds: True", "the words differ"),
        ("loss nan", "loss 2.26", "the words differ"),
        ("loss inf", "loss 2.26", "the words differ"),
        ("4-gram 0.5", "5-gram 0.5", "the words differ"),
        ("bf32", "bf16", "the words differ"),
        ("layer1 0.5", "layer0 0.5", "the words differ"),
        ("0.5", "0.5, 0.5", "the words differ"),
        ("0.5 0.5", "0.5", "the words differ"),
        ("ab 0.5", "a b 0.5", "the words differ"),
        ("0.5", "0.5\n0.5", "line 2: is missing: '0.5'"),
        ("0.5\n0.6", "0.5", "line 2: is too many: '0.6'"),
        ("0.5\n\n0.5", "0.5\n0.5\n", "line 2"),
    ],
)
def test_everything_else_is_a_difference_that_is_named(made, committed, said):
    assert said in difference(made, committed, LOOSE)


def test_what_is_not_stated_is_exact():
    only_counts = Tolerance(WHY, counts=5)
    assert difference("15 of 0.5", "10 of 0.5", only_counts) is None
    assert difference("15 of 0.51", "10 of 0.50", only_counts)
    only_relative = Tolerance(WHY, relative=Decimal("0.1"))
    assert difference("10 of 0.52", "10 of 0.50", only_relative) is None
    assert difference("11 of 0.50", "10 of 0.50", only_relative)


words = st.text(st.characters(whitelist_categories=["L"], whitelist_characters="_:,|()% "), max_size=12)
numbers = st.decimals(-10_000, 10_000, places=3)


@given(words, numbers, words, st.decimals(0, 1, places=3))
def test_exactly_the_numbers_within_the_absolute_tolerance_agree(before, number, after, allowed):
    tolerance = Tolerance(WHY, absolute=allowed)
    text = f"{before} {{}} {after}".format
    for step in (allowed, -allowed):
        assert difference(text(number + step), text(number), tolerance) is None
        further = number + step + (Decimal("0.001") if step >= 0 else Decimal("-0.001"))
        assert difference(text(further), text(number), tolerance) is not None


@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_every_text_agrees_with_itself_and_splits_without_a_loss(text):
    assert difference(text, text, Tolerance(WHY, counts=1)) is None
    assert "".join(NUMBER.split(text)) == text


@given(words, words)
def test_other_words_never_agree(one, other):
    same = " ".join(one.split()) == " ".join(other.split())
    if not same:
        assert difference(f"x{one} 1.5", f"x{other} 1.5", LOOSE) is not None


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"relative": 0.1}, "must say in one sentence why"),
        ({"relative": 0.1, "why": " "}, "must say in one sentence why"),
        ({"why": WHY}, "states no tolerance"),
        ({"why": WHY, "relative": 0}, "states no tolerance"),
        ({"why": WHY, "relativ": 0.1}, "unknown keys ['relativ']"),
        ({"why": WHY, "relative": -0.1}, "relative is -0.1"),
        ({"why": WHY, "relative": 1}, "relative is 1"),
        ({"why": WHY, "relative": float("nan")}, "relative is nan"),
        ({"why": WHY, "absolute": "0.1"}, "absolute is '0.1'"),
        ({"why": WHY, "counts": 1.5}, "counts is 1.5"),
        ({"why": WHY, "counts": True}, "counts is True"),
        ([0.1], "must be an object"),
    ],
)
def test_a_wrong_statement_is_refused_and_names_the_cell(stated, said):
    with pytest.raises(ValueError, match="05/notebook.ipynb, code cell 3: .*" + re.escape(said)):
        Tolerance.of({"numbers": stated}, "05/notebook.ipynb, code cell 3")


def test_a_cell_that_states_nothing_has_no_tolerance():
    assert Tolerance.of({}, "here") is None
    assert Tolerance.of({"numbers": {"why": WHY, "counts": 2}}, "here") == Tolerance(WHY, counts=2)


def test_through_a_kernel(tmp_path):
    """Each cell prints or shows something; its committed output differs from that in the way that its name says."""
    loose = {"numbers": {"relative": 0.02, "counts": 1, "why": WHY}}
    prints = "print('loss 2.26 of 10 in 3.2 s')"
    table = "import pandas as pd; pd.DataFrame({'loss': [2.26, -0.5]})"
    cases = {
        "within": (prints, "loss 2.28 of 11 in 9.9 s\n", loose, True),
        "without a tolerance": (prints, "loss 2.28 of 10 in 3.2 s\n", {}, False),
        "too far": (prints, "loss 2.36 of 10 in 3.2 s\n", loose, False),
        "another word": (prints, "gain 2.26 of 10 in 3.2 s\n", loose, False),
        "a line is missing": (prints, "loss 2.26 of 10 in 3.2 s\nand more\n", loose, False),
        "no output": ("pass", "loss 2.26\n", loose, False),
        "an output too many": ("print(1.5); 1.5", "1.5\n", loose, False),
        "misspelt": (prints, "loss 2.26 of 10 in 3.2 s\n", {"numbers": {"relativ": 0.1, "why": WHY}}, False),
        "table within": (table, "   loss\n0  2.27\n1  -0.5", loose, True),
        "table too far": (table, "   loss\n0  2.97\n1  -0.5", loose, False),
    }
    notebook = nbformat.v4.new_notebook()
    for number, (source, text, metadata, _) in enumerate(cases.values(), start=1):
        cell = nbformat.v4.new_code_cell(source, execution_count=number, metadata=metadata)
        if source == table:
            data = {"text/plain": text, "text/html": html_of(text)}
            cell.outputs = [nbformat.v4.new_output("execute_result", data, execution_count=number)]
        else:
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        notebook.cells.append(cell)
    path = tmp_path / "numbers.ipynb"
    nbformat.write(notebook, path)
    options = [str(ROOT / word) if word.startswith("tests/") else word for word in NBVAL]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "-vv", "--color=no", str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    for number, (name, (*_, passes)) in enumerate(cases.items()):
        verdict = "PASSED" if passes else "FAILED"
        assert f"::Cell {number} {verdict}" in done.stdout, f"{name}\n{done.stdout}"
    assert "line 1: 2.26 where 2.36 is committed" in done.stdout
    assert f"{tmp_path.name}/numbers.ipynb, code cell 7: numbers has unknown keys ['relativ']" in done.stdout


def html_of(table: str) -> str:
    """The table as pandas writes it for a browser."""
    lines = [line.split() for line in table.splitlines()[1:]]
    return pd.DataFrame({"loss": [float(value) for _, value in lines]})._repr_html_()
