"""The kill matrix as a figure, and a failure as a page of the gallery."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from common.diagnostics.core import Failure
from common.diagnostics.gallery import Cell
from common.foundation.plots import COLOURS, use_style

# verdict -> (colour, marker, size): told apart by shape as well as by colour
MARKS = {
    "caught": (COLOURS[1], "s", 90),
    "false alarm": (COLOURS[3], "X", 90),
    "silent": ("0.75", ".", 25),
    "pass": (COLOURS[2], "_", 60),
}


def matrix_figure(cells: Sequence[Cell], failures: Sequence[Failure]) -> Figure:
    """Rows are specimens, columns probes. A ring marks the probe that an entry names."""
    use_style()
    names, probes = (list(dict.fromkeys(getattr(cell, what) for cell in cells)) for what in ("failure", "probe"))
    figure, axes = plt.subplots(figsize=(2.6 + 0.34 * len(probes), 1.6 + 0.28 * len(names)))
    for verdict, (colour, marker, size) in MARKS.items():
        points = [(probes.index(c.probe), names.index(c.failure)) for c in cells if c.verdict == verdict]
        if points:
            axes.scatter(*zip(*points, strict=True), c=colour, marker=marker, s=size, label=verdict, zorder=3)
    named = [(probes.index(f.probe), names.index(f.id)) for f in failures if f.probe in probes and f.id in names]
    if named:
        ring = {"s": 190, "facecolors": "none", "edgecolors": "0.2", "linewidths": 1.2, "zorder": 4}
        axes.scatter(*zip(*named, strict=True), label="named by the entry", **ring)
    axes.set_xticks(range(len(probes)), probes, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlim=(-0.6, len(probes) - 0.4), ylim=(len(names) - 0.4, -0.6), title="Which probe catches which bug")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    return figure


def matrix_alt(cells: Sequence[Cell]) -> str:
    """The figure in words: how many bugs each probe catches."""
    caught = [cell.probe for cell in cells if cell.verdict == "caught"]
    counts = ", ".join(f"{probe} {caught.count(probe)}" for probe in dict.fromkeys(cell.probe for cell in cells))
    alarms = sum(cell.verdict == "false alarm" for cell in cells)
    return f"Kill matrix. Bugs caught by each probe: {counts}. False alarms on healthy code: {alarms}."


def entry_markdown(failure: Failure, cells: Sequence[Cell]) -> str:
    """One entry: what breaks, what one sees, what catches it and what does not, the fix."""
    mine = {cell.probe: cell for cell in cells if cell.failure == failure.id}
    caught = [cell for cell in mine.values() if cell.verdict == "caught"]
    silent = [probe for probe, cell in mine.items() if cell.verdict == "silent"]
    lines = [f"### {failure.title}", f"`{failure.id}`", "", f"**What breaks.** {failure.story}", ""]
    lines += [f"**What you see.** {failure.symptom[0].upper()}{failure.symptom[1:]}.", ""]
    if caught:
        readings = ", ".join(f"`{c.probe}` ({c.value:.3g}, healthy at most {c.threshold:.3g})" for c in caught)
        lines += [f"**What catches it.** {readings}. Silent: {len(silent)} of {len(mine)} probes.", ""]
    else:
        lines += [f"**What catches it.** Nothing; it survives. {failure.survives}", ""]
    return "\n".join([*lines, f"**The fix.** {failure.fix}", "", f"*Source: {failure.source}.*"])
