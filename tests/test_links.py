"""Every relative link and anchor in Markdown files and notebooks leads somewhere. Web links are not asked."""

import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from markdown_it import MarkdownIt

from common.foundation.months import ROOT

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
FILES = [name for name in TRACKED if name.endswith((".md", ".ipynb")) and (ROOT / name).exists()]
if not FILES:  # not a checkout: an unpacked archive
    FILES = [
        str(p.relative_to(ROOT)) for pattern in ("*.md", "[01]*/*.md", "[01]*/*.ipynb") for p in ROOT.glob(pattern)
    ]


def markdown_of(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def links_and_anchors(path: Path) -> tuple[list[str], set[str]]:
    """Targets of links and images, and the anchors that the web view gives to the headings."""
    links, anchors = [], set()
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown_of(path))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open":
            anchors.add(slug(following.content))
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                links.append(str(target))
    return links, anchors


def slug(heading: str) -> str:
    """As the web view makes them: lower case, punctuation gone, spaces to hyphens."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    path = ROOT / name
    links, _ = links_and_anchors(path)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), f"{name}: {link} leads nowhere"
        if anchor and found.suffix in (".md", ".ipynb"):
            assert anchor in links_and_anchors(found)[1], f"{name}: {link}: no such heading"


def test_slugs_are_those_of_the_web_view():
    assert slug("## 1. Text, and what is held out".lstrip("# ")) == "1-text-and-what-is-held-out"


def test_the_readme_is_among_them():
    assert "README.md" in FILES
