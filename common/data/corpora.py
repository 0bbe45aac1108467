"""The real texts of the year as documents: Shakespeare's plays scene by scene, encyclopedia and web samples."""

import json
import re

from common.data.documents import Document
from common.data.problems import addition_problems, solved_documents
from common.data.split import hash_split
from common.foundation.assets import asset

# The nine plays of the TinyShakespeare cut in its order, and its length in characters.
TINY_PLAYS = (
    "coriolanus",
    "richard-iii",
    "richard-ii",
    "romeo-and-juliet",
    "henry-vi-part-3",
    "a-winter-s-tale",
    "measure-for-measure",
    "the-taming-of-the-shrew",
    "the-tempest",
)
TINY_CHARACTERS = 1_115_394

# Stage directions stand as _Exit_, as *Exit* (one play) or as __[Aside]_ within a speech.
_STAGE = re.compile(r"[_\\]*\[[^\]_]*[\]_\\]+|(?<![\w*])(_[^_]+_|\*(?!\*)[^*]+\*(?!\*))(?!\w)")
_SPEAKER = re.compile(r"\*\*(.+?)\*\*")


def speech_text(markdown: str) -> str:
    """A play or scene in the form `SPEAKER:\\nline\\nline\\n\\n`: headings and stage directions go, speeches stay.

    >>> speech_text("### SCENE I\\n\\n_Enter HAMLET_\\n\\n**HAMLET**  \\nTo be, or not to be:  \\nthat is it.\\n")
    'HAMLET:\\nTo be, or not to be:\\nthat is it.\\n'
    """
    blocks = []
    for block in re.split(r"\n\s*\n", markdown):
        if block.startswith("#"):
            continue
        block = _STAGE.sub("", block)
        lines = [_SPEAKER.sub(r"\1:", line).replace("\\", "").strip() for line in block.splitlines()]
        text = "".join(line + "\n" for line in lines if line)
        if _SPEAKER.match(block.lstrip()) or not blocks:
            blocks.append(text)
        else:  # the speech goes on after a stage direction
            blocks[-1] += text
    return "\n".join(filter(None, blocks))


def shakespeare_scenes() -> list[Document]:
    """Every scene of all 38 plays in a fixed order. `name` is "hamlet/3", `group` the play."""
    scenes = []
    for path in sorted(asset("shakespeare").rglob("*.md")):
        parts = re.split(r"^(?=### )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        texts = [speech_text(part) for part in parts]
        scenes += [
            Document(f"{path.stem}/{number}", path.stem, text) for number, text in enumerate(filter(None, texts), 1)
        ]
    return scenes


def split_by_play(scenes: list[Document], *, salt: str = "") -> dict[str, list[Document]]:
    """Train, validation and test scenes; all scenes of a play are in one of them."""
    parts: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for scene in scenes:
        parts[hash_split(scene.group, salt=salt)].append(scene)
    return parts


def tiny_shakespeare() -> str:
    """The TinyShakespeare cut rebuilt from the same edition: the same nine plays, cut at the same length.

    About 98 % of its lines equal the original's, which lost some to scraping: losses on the two are comparable, not
    identical. `asset("tinyshakespeare")` is the original.
    """
    plays = {path.stem: path for path in asset("shakespeare").rglob("*.md")}
    text = "\n".join(speech_text(plays[name].read_text(encoding="utf-8")) for name in TINY_PLAYS)
    return text[:TINY_CHARACTERS]


def wiki_documents() -> list[Document]:
    """The encyclopedia sample, one document for each line of the file."""
    lines = asset("wiki").read_text(encoding="utf-8").splitlines()
    return [Document(f"wiki/{number}", "wiki", line) for number, line in enumerate(filter(str.strip, lines), 1)]


def web_documents() -> list[Document]:
    """The web sample, uncleaned."""
    lines = asset("web").read_text(encoding="utf-8").splitlines()
    return [Document(f"web/{number}", "web", json.loads(line)["text"]) for number, line in enumerate(lines, 1)]


def code_documents() -> list[Document]:
    """Python source files."""
    folder = asset("code")
    return [
        Document(path.relative_to(folder).as_posix(), "code", path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    ]


def chinese_documents() -> list[Document]:
    """Questions and answers in Chinese."""
    rows = json.loads(asset("chinese").read_text(encoding="utf-8"))
    return [
        Document(f"chinese/{i}", "chinese", row["instruction"] + "\n" + row["output"]) for i, row in enumerate(rows)
    ]


def year_sources(split: str) -> dict[str, list[Document]]:
    """The texts that the year trains on, by domain, in one split.

    Plays are split as a whole, encyclopedia and web by document, sums by problem; each by its hash.
    """

    def part(documents: list[Document]) -> list[Document]:
        return [document for document in documents if hash_split(document.name) == split]

    return {
        "plays": split_by_play(shakespeare_scenes())[split],
        "wiki": part(wiki_documents()),
        "web": part(web_documents()),
        "sums": solved_documents(addition_problems(2, split)),
    }
