"""The year in one page: `runs/report.html`, made from the summaries and manifests of finished runs alone.

A summary has the same parts in every month, each a list (so months can add their own keys without touching this file):
`claims` (from `evidence.claim`), `numbers` (from `evidence.number`), `figures` (from `plots.save`) and `samples`
(`title`, `text`). The page is self-contained: figures are embedded, nothing is fetched.
"""

import base64
from pathlib import Path
from typing import Any

import jinja2

from common.foundation.files import atomic_path, read_json
from common.foundation.months import MONTHS, is_built
from common.foundation.run import official, runs_root

TEMPLATE = Path(__file__).with_name("report.html.j2")


def show_value(value: Any) -> str:
    """0.912, or 0.912 [0.894, 0.928] where there is an interval."""
    if isinstance(value, dict):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def show_cost(manifest: dict[str, Any]) -> str:
    """The bill of a run in one line."""
    tokens = ", ".join(f"{count:,} {kind}" for kind, count in manifest["tokens"].items())
    return (
        f"{manifest['wall_seconds']:.0f} s wall, {manifest['cpu_seconds']:.0f} CPU s, "
        f"{manifest['peak_memory_bytes'] / 2**20:,.0f} MiB, {manifest['flops']:.2g} FLOP; tokens: {tokens or 'none'}"
    )


def month_entry(folder: str, size: str) -> dict[str, Any] | None:
    """What the page shows of the finished run of a month, or None."""
    directory = official(folder, size) if is_built(folder) else None
    if directory is None:
        return None
    summary, manifest = read_json(directory / "summary.json"), read_json(directory / "manifest.json")
    figures = [
        {**figure, "data": base64.b64encode((directory / figure["file"]).read_bytes()).decode("ascii")}
        for figure in summary["figures"]
    ]
    return {"summary": summary, "manifest": manifest, "figures": figures, "cost": show_cost(manifest)}


def write_report(size: str, notes: dict[str, str] | None = None) -> Path:
    """Write runs/report.html from the finished run of each month at that size.

    Args:
        notes: folder -> why a month has no run, such as an input that could not be fetched.
    """
    notes = notes or {}
    months = [
        {
            "month": month,
            "built": is_built(month.folder),
            "run": month_entry(month.folder, size),
            "warning": month.folder in notes,
            "note": notes.get(month.folder, "not run yet at this size" if is_built(month.folder) else "not built yet"),
        }
        for month in MONTHS
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(value=show_value)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    path = runs_root() / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(template.render(months=months, size=size), encoding="utf-8", newline="\n")
    return path
