"""What strict comparison of outputs cannot see: that the outputs are there at all, in order, and complete."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from common.foundation.months import ROOT, month
from tests.__main__ import executing
from tests.notebook_numbers import Tolerance

NOTEBOOKS = sorted(ROOT.glob("[01]*/*.ipynb"))
HEADER = {"month", "claim", "objectives", "needs", "minutes_on_two_cores", "peak_memory_mib", "seed", "scales"}


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")


@by_name
def test_every_code_cell_was_executed_once_in_order_without_an_error(path):
    code = [cell for cell in cells(path, "code") if cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    errors = [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not errors


@by_name
def test_header_and_length(path):
    first = cells(path, "markdown")[0].source
    header = tomllib.loads(re.search(r"```toml\n(.*?)```", first, flags=re.DOTALL)[1])
    assert set(header) == HEADER
    assert month(header["month"]).folder == path.parent.name
    assert len(nbformat.read(path, as_version=4).cells) <= 64


@by_name
def test_it_ends_with_a_claim_that_holds(path):
    *_, last = cells(path, "code")
    assert "claim(" in last.source
    assert any("verdict  holds" in output.get("text", "") for output in last.outputs)


@by_name
def test_few_cells_say_that_their_numbers_may_move_and_all_say_why(path):
    """May's notebook needs nine of thirty, its gallery three of eight: those that train."""
    code = cells(path, "code")
    stated = [Tolerance.of(cell.metadata, f"{path.name}, code cell {i}") for i, cell in enumerate(code)]
    assert sum(tolerance is not None for tolerance in stated) <= 0.4 * len(code)
    others = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type != "code"]
    assert not any("numbers" in cell.metadata for cell in others), "a tolerance is a matter of code cells"


def test_executing_again_keeps_what_cells_state_and_nothing_else(tmp_path):
    stated = {"numbers": {"absolute": 0.1, "why": "a training decides them"}, "collapsed": True}
    path = tmp_path / "one.ipynb"
    cell = nbformat.v4.new_code_cell("print(1 + 1)", metadata=stated)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    done = subprocess.run([sys.executable, "-m", *executing([str(path)])], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (again,) = nbformat.read(path, as_version=4).cells
    assert again.metadata == {"numbers": stated["numbers"]}
    assert again.outputs[0].text == "2\n"


@by_name
def test_every_picture_comes_with_its_numbers(path):
    for cell in cells(path, "code"):
        pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        if pictures:
            said = [output for output in cell.outputs if output.output_type == "stream"]
            assert said, f"a picture without alt text: {cell.source[:60]}"
            assert "show(" in cell.source


@by_name
def test_no_path_of_a_machine_and_no_warning(path):
    for cell in cells(path, "code"):
        for output in cell.outputs:
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/(home|root|tmp|Users|work)/", text), text[:200]
            assert output.get("name") != "stderr", text[:200]


def exercises(path):
    """(number, source of the visible check, source of the folded solution) of each exercise in a notebook."""
    checks = {m[1]: cell.source for cell in cells(path, "code") if (m := re.match(r"def check_(\d+)\(", cell.source))}
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    solutions = re.findall(r"<summary>Solution (\d+)</summary>\s*```python\n(.*?)```", text, flags=re.DOTALL)
    assert [number for number, _ in solutions] == list(checks), f"{path.name}: a check or a solution is missing"
    return [(number, checks[number], source) for number, source in solutions]


EXERCISES = [
    pytest.param(*exercise, id=f"{path.parent.name}-{exercise[0]}")
    for path in NOTEBOOKS
    if path.name == "notebook.ipynb"
    for exercise in exercises(path)
]


def test_three_to_six_exercises_a_month():
    for path in NOTEBOOKS:
        if path.name == "notebook.ipynb":
            assert 3 <= len(exercises(path)) <= 6, path


@pytest.mark.parametrize(("number", "check", "solution"), EXERCISES)
def test_solutions_pass_their_check_and_nothing_passes_by_doing_nothing(number, check, solution):
    scope = {}
    exec(check, scope)
    exec(solution, scope)
    scope[f"check_{number}"](scope[f"solution_{number}"])
    with pytest.raises((AssertionError, TypeError)):
        scope[f"check_{number}"](lambda *_: None)


def test_a_changed_number_fails_the_comparison(tmp_path):
    """The negative control of the notebook tests: the same notebook with another printed loss must fail."""
    good = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("print('loss 2.2607 bits per byte in 3.2 s')", execution_count=1)]
    )
    for text, passes in (
        ("loss 2.2607 bits per byte in 9.9 s\n", True),
        ("loss 2.2608 bits per byte in 3.2 s\n", False),
    ):
        good.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        path = tmp_path / f"{passes}.ipynb"
        nbformat.write(good, path)
        config = Path(__file__).with_name("nbval.cfg")
        words = ["-p", "no:cacheprovider", "--nbval", "--nbval-current-env", "--nbval-sanitize-with", str(config)]
        done = subprocess.run([sys.executable, "-m", "pytest", *words, str(path)], cwd=tmp_path, capture_output=True)
        assert (done.returncode == 0) == passes, done.stdout.decode()
