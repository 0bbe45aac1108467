"""Tables in READMEs come from runs: the text between two markers is generated, never typed.

    <!-- numbers:01_spine -->
    ...
    <!-- /numbers:01_spine -->

Blocks: `numbers:<month>` and `samples:<month>` (of a month's latest run), `year` (all months), `gallery` (what gallery.csv
says), `size` (how much there is to read) and `trainings` (several trainings of the base model). A test renders them again
from a fresh run and compares.
"""

import csv
import math
import re
from collections.abc import Collection
from pathlib import Path

from common.foundation import published, trainings
from common.foundation.files import atomic_path, read_json
from common.foundation.months import MONTHS, ROOT, built_months, is_built
from common.foundation.report import show_value
from common.foundation.run import needed, official

USUAL_LOOKS = (
    "beats-unigram",
    "samples-look-right",
    "repeatable",
    "shapes-and-ranges",
    "round-trip",
    "loss-at-init",
    "overfit-one-batch",
)


def numbers_table(folder: str, size: str) -> str:
    """The numbers of the latest finished run of a month as a Markdown table."""
    directory = needed(folder, size)
    summary = read_json(directory / "summary.json")
    lines = ["| number | value, 95 % interval | unit | note |", "|---|---|---|---|"]
    spreads = year_spreads() if folder == "05_pretraining" and size == "small" else {}
    for row in summary["numbers"]:
        note, trained = row["note"], spreads.get(row["name"])
        if trained:
            note = f"{note}; {len(trained)} trainings: {min(trained):.3f} to {max(trained):.3f}"
        lines.append(f"| {row['name']} | {show_value(row['value'])} | {row['unit']} | {note} |")
    return "\n".join([*lines, "", f"Size `{size}`, config `{directory.name}`."])


def year_spreads() -> dict[str, list[float]]:
    """Each number of the base model over the trainings of the recipe that the year uses: the first in the file."""
    records = trainings.read() if trainings.TRAININGS.exists() else []
    return trainings.spreads(trainings.of(records, records[0]["recipe"])) if records else {}


def samples_text(folder: str, size: str) -> str:
    """The samples of the latest finished run of a month, each under its title."""
    summary = read_json(needed(folder, size) / "summary.json")
    return "\n\n".join(f"*{one['title']}*\n\n```text\n{one['text'].strip()}\n```" for one in summary["samples"])


def run_time(seconds: float) -> str:
    """Coarse on purpose. The table shows CPU seconds over two cores: a busy machine adds less to them than to the clock.

    >>> run_time(11), run_time(200)
    ('under a minute', 'about 4 minutes')
    """
    return "under a minute" if seconds < 60 else f"about {math.ceil(seconds / 60)} minutes"


def year_table(size: str) -> str:
    """All twelve months: title, claim with its number, and links to what is there."""
    lines = [f"| month | what | claim at size `{size}` | run time | notebook | failures |", "|---|---|---|---|---|---|"]
    for month in MONTHS:
        if not is_built(month.folder):
            lines.append(f"| {month.number:02d} {month.name} | {month.title} | planned | | | |")
            continue
        directory = official(month.folder, size)
        claims = read_json(directory / "summary.json")["claims"] if directory else []
        said = "<br>".join(f"{c['text']}: {show_value(c['value'])} {c['unit']}".strip() for c in claims)
        time = run_time(read_json(directory / "manifest.json")["cpu_seconds"] / 2) if directory else ""
        lines.append(
            f"| [{month.number:02d} {month.name}]({month.folder}/README.md) | {month.title} | {said} | {time} "
            f"| [read]({month.folder}/notebook.ipynb) | [read]({month.folder}/failures.ipynb) |"
        )
    return "\n".join(lines)


def gallery_sentence() -> str:
    """What the committed kill matrix says, in a sentence."""
    with open(ROOT / "gallery.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["failure"].startswith("healthy/")]
    bugs = list(dict.fromkeys(row["failure"] for row in rows))
    caught = {row["failure"] for row in rows if row["verdict"] == "caught"}
    usual = {row["failure"] for row in rows if row["verdict"] == "caught" and row["probe"] in USUAL_LOOKS}
    return (
        f"{len(bugs)} bugs against {len({row['probe'] for row in rows})} probes: {len(caught)} are caught by a probe, "
        f"{len(usual)} of them by the looks that everybody takes (`{'`, `'.join(USUAL_LOOKS)}`); "
        f"{len(bugs) - len(caught)} by nothing."
    )


def size_sentence() -> str:
    """How much there is to read, and how much it leans on: lines to the hundred, direct dependencies."""
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "common").rglob("*.py"))
    pins = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    return f"`common/` has about {round(lines, -2):,} lines, comments included; {len(pins)} packages are pinned."


def rendered(text: str, size: str, *, leave: Collection[str] = ()) -> str:
    """`text` with every marked block made again, without the blocks of the months in `leave`."""

    def block(match: re.Match) -> str:
        name, folder = match["name"], match["folder"]
        if folder in leave:
            return match[0]
        make = {
            "year": lambda: year_table(size),
            "gallery": gallery_sentence,
            "size": size_sentence,
            "trainings": lambda: trainings.table(trainings.read()),
        }
        of_month = {"numbers": numbers_table, "samples": samples_text}
        body = of_month[name](folder, size) if folder else make[name]()
        mark = name if folder is None else f"{name}:{folder}"
        return f"<!-- {mark} -->\n{body}\n<!-- /{mark} -->"

    opening = r"<!-- (?P<name>year|numbers|samples|gallery|size|trainings)(?::(?P<folder>\w+))? -->"
    pattern = opening + r"\n.*?<!-- /(?P=name)(?::(?P=folder))? -->"
    return re.sub(pattern, block, text, flags=re.DOTALL)


def marked_readmes() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("[01]*/README.md"))
        if "<!-- " in path.read_text("utf-8")
    ]


def update_readmes(size: str) -> list[Path]:
    """Write the tables of every README, and `published.json` beside them; returns the READMEs that changed."""
    changed = []
    finished = {folder: path for folder in (m.folder for m in built_months()) if (path := official(folder, size))}
    published.write({folder: read_json(path / "summary.json") for folder, path in finished.items()})
    for path in marked_readmes():
        before = path.read_text(encoding="utf-8")
        after = rendered(before, size)
        if after != before:
            with atomic_path(path) as temporary:
                temporary.write_text(after, encoding="utf-8", newline="\n")
            changed.append(path)
    return changed
