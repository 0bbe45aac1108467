import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pytest

from common.foundation.plots import bars, curves, flow, grid, numbers, save, show
from common.foundation.statistics import Interval


def interval(mean):
    return Interval(mean, mean - 0.1, mean + 0.1, 9, "bootstrap")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_numbers_are_those_that_are_drawn():
    figure = curves(
        [1, 2, 3],
        {"a": [interval(1), interval(3), interval(2)], "b": [5.0, 4.0, 3.0]},
        title="t",
        xlabel="x",
        ylabel="y",
    )
    assert numbers(figure) == [
        "a: n=3, first 1.000, last 2.000, min 1.000, max 3.000",
        "b: n=3, first 5.000, last 3.000, min 3.000, max 5.000",
    ]


def test_bars_name_their_values_in_order():
    figure = bars({"first": interval(0.5), "second": 0.25}, title="t", xlabel="x", highlight=["second"])
    assert numbers(figure) == ["first: 0.500", "second: 0.250"]
    colours = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert colours[0] != colours[1]


def test_save_makes_alt_text_from_the_numbers(tmp_path):
    kept = save(bars({"a": 0.5}, title="Halves", xlabel="x"), tmp_path / "f.png", caption="c")
    assert kept == {"file": "f.png", "alt": "Halves. a: 0.500", "caption": "c"}
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_show_prints_what_a_test_can_compare(capsys):
    show(bars({"a": 0.5}, title="t", xlabel="x"), alt="one bar")
    assert capsys.readouterr().out.splitlines()[:2] == ["one bar", "  a: 0.500"]


def test_flow_draws_each_step():
    figure = flow([("7+8+0=", "51", "write 5"), ("4+3+1=", "80", "write 8")], title="t")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"7+8+0=", "51", "write 5", "80"} <= texts


def test_a_grid_crosses_out_what_is_not_below_the_limit():
    rows = {"calm": [1.0, 2.0], "wild": [3.5, float("inf")]}
    figure = grid(rows, ["0.1", "1"], title="t", xlabel="rate", limit=3.0)
    assert numbers(figure) == ["calm: 1.00 2.00", "wild: × ×"]
