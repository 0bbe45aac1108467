"""Fixtures of the tests of damaged files: folders that are written once and copied for each test."""

import json

import pytest

from tests.pretrained.written import TEMPLATE, theirs_of, tokenizer_of

BY_SIZE = {"shards": "150KB"}


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Bytes of the files of folders: in one piece, in shards, and of other families."""
    made = {}
    for name, family in {"one": "llama-tied", "shards": "llama-tied", "gpt2": "gpt2", "mixtral": "mixtral"}.items():
        folder = tmp_path_factory.mktemp(name)
        theirs_of(family).save_pretrained(folder, max_shard_size=BY_SIZE.get(name, "1GB"))
        (folder / "tokenizer.json").write_text(tokenizer_of().to_hf_json(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
        made[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return made


@pytest.fixture
def fresh(originals, tmp_path):
    def copy(name="one"):
        folder = tmp_path / name
        folder.mkdir()
        for file, raw in originals[name].items():
            (folder / file).write_bytes(raw)
        return folder

    return copy


@pytest.fixture
def folder(fresh):
    return fresh()
