"""Tables in READMEs come from runs: the text between two markers is generated, never typed.

    <!-- numbers:01_spine -->
    ...
    <!-- /numbers:01_spine -->

holds the table of a month's numbers; `<!-- year -->` … `<!-- /year -->` holds the table of all months. A test renders
them again from a fresh run and compares.
"""

import re
from pathlib import Path

from common.foundation.files import atomic_path, read_json
from common.foundation.months import MONTHS, ROOT, is_built
from common.foundation.report import show_value
from common.foundation.run import latest, needed


def numbers_table(folder: str, size: str) -> str:
    """The numbers of the latest finished run of a month as a Markdown table."""
    directory = needed(folder, size)
    summary = read_json(directory / "summary.json")
    lines = ["| number | value, 95 % interval | unit | note |", "|---|---|---|---|"]
    for row in summary["numbers"]:
        lines.append(f"| {row['name']} | {show_value(row['value'])} | {row['unit']} | {row['note']} |")
    return "\n".join([*lines, "", f"Size `{size}`, config `{directory.name}`."])


def year_table(size: str) -> str:
    """All twelve months: title, claim with its number, and links to what is there."""
    lines = ["| month | what | claim at size `small` | notebook | failures |", "|---|---|---|---|---|"]
    for month in MONTHS:
        if not is_built(month.folder):
            lines.append(f"| {month.number:02d} {month.name} | {month.title} | planned | | |")
            continue
        directory = latest(month.folder, size)
        claims = read_json(directory / "summary.json")["claims"] if directory else []
        said = "<br>".join(f"{c['text']}: {show_value(c['value'])} {c['unit']}".strip() for c in claims)
        lines.append(
            f"| [{month.number:02d} {month.name}]({month.folder}/README.md) | {month.title} | {said} "
            f"| [read]({month.folder}/notebook.ipynb) | [read]({month.folder}/failures.ipynb) |"
        )
    return "\n".join(lines)


def rendered(text: str, size: str) -> str:
    """`text` with every marked block made again."""

    def block(match: re.Match) -> str:
        name, folder = match["name"], match["folder"]
        body = year_table(size) if name == "year" else numbers_table(folder, size)
        mark = name if folder is None else f"{name}:{folder}"
        return f"<!-- {mark} -->\n{body}\n<!-- /{mark} -->"

    pattern = r"<!-- (?P<name>year|numbers)(?::(?P<folder>\w+))? -->\n.*?<!-- /(?P=name)(?::(?P=folder))? -->"
    return re.sub(pattern, block, text, flags=re.DOTALL)


def marked_readmes() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("[01]*/README.md"))
        if "<!-- " in path.read_text("utf-8")
    ]


def update_readmes(size: str) -> list[Path]:
    """Write the tables of every README; returns those that changed."""
    changed = []
    for path in marked_readmes():
        before = path.read_text(encoding="utf-8")
        after = rendered(before, size)
        if after != before:
            with atomic_path(path) as temporary:
                temporary.write_text(after, encoding="utf-8", newline="\n")
            changed.append(path)
    return changed
