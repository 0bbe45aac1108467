"""The real texts, and the rules that turn a play into speeches."""

import difflib
import os
from pathlib import Path

import pytest

from common.data.corpora import (
    TINY_CHARACTERS,
    shakespeare_scenes,
    speech_text,
    split_by_play,
    tiny_shakespeare,
    web_documents,
    wiki_documents,
)
from common.foundation.assets import AssetUnavailable, asset


@pytest.fixture(scope="module")
def scenes():
    return shakespeare_scenes()


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("**A**  \nOne,  \ntwo.\n\n_Exit_\n\n**B**  \nThree.\n", "A:\nOne,\ntwo.\n\nB:\nThree.\n"),
        ("**A**  \nOne.\n\n_Shouts_\n\nTwo.\n", "A:\nOne.\nTwo.\n"),  # the speech goes on
        ("**A**  \n_[Aside]_ One.\n", "A:\nOne.\n"),
        ("**A**  \n__[Sings]\\__  \nOne.\n", "A:\nOne.\n"),
        ("**A**  \n\\--with care--  \n", "A:\n--with care--\n"),
        ("## ACT I\n\n### SCENE I. Here.\n\n", ""),
        ("*Exit Audley.*\n\n**A**  \nOne.\n", "A:\nOne.\n"),
    ],
)
def test_speech_text(markdown, text):
    assert speech_text(markdown) == text


def test_all_plays_are_there_and_clean(scenes):
    assert len({scene.group for scene in scenes}) == 38
    text = "".join(scene.text for scene in scenes)
    assert 4_700_000 < len(text) < 4_850_000
    assert not set("_*[]#\\") & set(text), "markup that the rules did not remove"
    assert len(set(text)) < 80
    assert all(scene.text.strip() for scene in scenes)
    assert len({scene.name for scene in scenes}) == len(scenes)


def test_a_play_is_never_split(scenes):
    parts = split_by_play(scenes)
    groups = {name: {scene.group for scene in part} for name, part in parts.items()}
    assert all(groups.values())
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["validation"] & groups["test"]
    assert sum(map(len, parts.values())) == len(scenes)


def test_tiny_shakespeare_is_the_known_cut():
    ours = tiny_shakespeare()
    assert len(ours) == TINY_CHARACTERS
    assert ours.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")


@pytest.mark.skipif(
    not (Path(os.environ.get("SPINE_ASSETS") or "nowhere") / "tinyshakespeare.txt").exists(), reason="no mirror"
)
def test_tiny_shakespeare_is_close_to_the_original():
    ours, original = tiny_shakespeare().splitlines(), asset("tinyshakespeare").read_text("utf-8").splitlines()
    assert difflib.SequenceMatcher(None, ours, original, autojunk=False).ratio() > 0.98


def test_other_domains():
    try:
        wiki, web = wiki_documents(), web_documents()
    except AssetUnavailable as error:
        pytest.skip(str(error))
    assert sum(len(document.text) for document in wiki) > 1_000_000
    assert len(web) == 300
