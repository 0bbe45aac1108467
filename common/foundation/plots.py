"""One style for every figure of the year, and the few kinds of figure that most of them are.

Colours are those of Okabe and Ito, which readers with any colour vision can tell apart; lines also differ in dash and
marker. Every figure comes with alt text, and its numbers can be printed, so that a test can compare them.
"""

import io
import itertools
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import ScalarFormatter

from common.foundation.statistics import Interval

if "ipykernel" not in sys.modules:
    mpl.use("agg")  # a script draws into files: no window, no display needed

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vPX"


def use_style() -> None:
    """Set the style for this process."""
    mpl.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
        }
    )


def curves(
    x: Sequence[float] | Mapping[str, Sequence[float]],
    lines: Mapping[str, Sequence[Interval | float]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    level: tuple[str, float] | None = None,
    logarithmic: str = "",
) -> Figure:
    """Lines over x, with error bars where the values are Intervals.

    Args:
        x: places for all lines, or for each its own by label.
        level: a labelled horizontal line.
        logarithmic: axes with powers of ten: "x", "y" or "xy".
    """
    use_style()
    figure, axes = plt.subplots()
    styles = itertools.cycle(zip(COLOURS, DASHES, MARKERS, strict=True))
    for (label, values), (colour, dash, marker) in zip(lines.items(), styles, strict=False):
        means, places = [_mean(value) for value in values], x[label] if isinstance(x, Mapping) else x
        mark = marker if len(places) <= 40 else None
        axes.plot(places, means, color=colour, linestyle=dash, marker=mark, label=label)
        if any(isinstance(value, Interval) for value in values):
            axes.errorbar(places, means, yerr=_errors(values), fmt="none", ecolor=colour, capsize=3)
    for name in logarithmic:
        getattr(axes, f"set_{name}scale")("log")
        low, high = getattr(axes, f"get_{name}lim")()
        if high < 10 * low:  # within one power of ten: plain numbers
            axis = getattr(axes, f"{name}axis")
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(ScalarFormatter())
    if level:
        axes.axhline(level[1], color="0.35", linewidth=1, linestyle=":", label=level[0])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    every = [value for places in x.values() for value in places] if isinstance(x, Mapping) else x
    if "x" not in logarithmic and all(float(value).is_integer() for value in every):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(lines) > 4:  # many labels cover the lines: beside the plot instead
        figure.legend(loc="outside right center", fontsize=9)
    else:
        axes.legend()
    return figure


def bars(
    rows: Mapping[str, Interval | float],
    *,
    title: str,
    xlabel: str,
    limit: float | None = None,
    highlight: Collection[str] = (),
) -> Figure:
    """Horizontal bars, first row on top, each with its interval and its number; the rows to look at in `highlight`."""
    use_style()
    figure, axes = plt.subplots(figsize=(7.0, 0.9 + 0.42 * len(rows)))
    means = [_mean(value) for value in rows.values()]
    places = np.arange(len(rows))[::-1]
    colours = [COLOURS[1] if name in highlight else COLOURS[0] for name in rows]
    axes.barh(places, means, color=colours, height=0.62, xerr=_errors(list(rows.values())), ecolor="0.25", capsize=3)
    ends = [value.high if isinstance(value, Interval) else value for value in rows.values()]
    for place, mean, end in zip(places, means, ends, strict=True):
        axes.annotate(f"{mean:.3f}", (end, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, list(rows))
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel=xlabel, xlim=(0, limit or 1.12 * max([*ends, 1e-9])))
    return figure


def grid(
    rows: Mapping[str, Sequence[float]], columns: Sequence[str], *, title: str, xlabel: str, limit: float
) -> Figure:
    """A table of numbers as coloured cells, darker is lower; those not below `limit` are crossed out."""
    use_style()
    figure, axes = plt.subplots(figsize=(7.0, 1.1 + 0.42 * len(rows)))
    values = np.array(list(rows.values()), dtype=float)
    good = values[values < limit]
    shown = np.ma.masked_where(~(values < limit), values)
    axes.imshow(shown, cmap="cividis", aspect="auto", vmin=good.min(initial=limit), vmax=limit)
    for (row, column), value in np.ndenumerate(values):
        broken = not value < limit
        text = "×" if broken else f"{value:.2f}"
        middle = (good.min(initial=limit) + limit) / 2
        axes.text(
            column, row, text, ha="center", va="center", color="0.4" if broken else "w" if value < middle else "k"
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.grid(visible=False)
    axes.set(title=title, xlabel=xlabel)
    return figure


def flow(rows: Sequence[tuple[str, str, str]], *, title: str) -> Figure:
    """A trace drawn step by step: each row is (what went in, what came out, what was made of it)."""
    use_style()
    figure, axes = plt.subplots(figsize=(7.0, 0.6 + 0.55 * len(rows)))
    axes.set(title=title, xlim=(0, 10), ylim=(-len(rows) + 0.4, 0.6))
    axes.axis("off")
    for place, (given, made, note) in enumerate(rows):
        for x, text, colour in ((1.5, given, COLOURS[0]), (4.6, made, COLOURS[1])):
            box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour}
            axes.text(x, -place, text, ha="center", va="center", family="monospace", bbox=box)
        arrow = {"arrowstyle": "->", "color": "0.35"}
        axes.annotate("", xy=(3.9, -place), xytext=(2.6, -place), arrowprops=arrow)
        axes.text(5.5, -place, note, va="center", color="0.25")
    return figure


def _mean(value: Interval | float) -> float:
    return value.mean if isinstance(value, Interval) else float(value)


def _errors(values: Sequence[Interval | float]) -> np.ndarray:
    """Distances below and above the mean, (2, n); zero for exact values."""
    pairs = [(v.mean - v.low, v.high - v.mean) if isinstance(v, Interval) else (0.0, 0.0) for v in values]
    return np.clip(np.array(pairs).T, 0, None)


def numbers(figure: Figure) -> list[str]:
    """What is drawn, as text: for each labelled line its points, for each bar its length, for each grid its cells."""
    found = []
    for axes in figure.axes:
        for line in axes.get_lines():
            label, y = str(line.get_label()), np.asarray(line.get_ydata(), dtype=float)
            if label.startswith("_") or not len(y):
                continue
            found.append(
                f"{label}: n={len(y)}, first {y[0]:.3f}, last {y[-1]:.3f}, min {y.min():.3f}, max {y.max():.3f}"
            )
        names = [tick.get_text() for tick in axes.get_yticklabels()]
        widths = [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)]
        if widths and len(widths) == len(names):
            found += [f"{name}: {width:.3f}" for name, width in zip(names, widths, strict=True)]
        for image in axes.get_images():
            cells = [text.get_text() for text in axes.texts]
            across = len(cells) // max(1, len(names))
            found += [
                f"{name}: {' '.join(cells[i * across : (i + 1) * across])}" for i, name in enumerate(names) if image
            ]
    return found


def save(figure: Figure, path: str | Path, *, caption: str, alt: str = "") -> dict[str, str]:
    """Write the figure as PNG and return what a report needs: file name, alt text, caption.

    Without `alt`, the alt text is the title and the numbers that are drawn.
    """
    alt = alt or f"{figure.axes[0].get_title(loc='left')}. {'; '.join(numbers(figure))}"
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)
    return {"file": Path(path).name, "alt": alt, "caption": caption}


def show(figure: Figure, *, alt: str) -> None:
    """Display in a notebook: `alt` and the numbers that are drawn as printed text, then the picture.

    Tests compare the text and ignore the picture: it differs between machines where the numbers do not. The alt text of
    the picture is `alt` with the numbers.
    """
    from IPython.display import Image, display

    numbers_drawn = numbers(figure)
    print(alt)
    for line in numbers_drawn:
        print(f"  {line}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    display(Image(buffer.getvalue(), alt="; ".join([alt, *numbers_drawn])))
