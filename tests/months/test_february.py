"""February as a whole: the run, what it wrote, and that other months can build on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.data.shards import Shards
from common.data.stream import BatchStream
from common.foundation.files import read_json
from common.foundation.months import ROOT, load
from common.foundation.run import configure, status
from common.tokenization.bpe import BPETokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The directory of a finished run at size tiny, and its summary."""
    runs = tmp_path_factory.mktemp("runs")
    words = [sys.executable, "-m", "common", "month", "2", "--size", "tiny"]
    done = subprocess.run(words, env={**os.environ, "SPINE_RUNS": str(runs)}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    return Path(summary["run"]), summary


def test_the_script_is_short_and_its_sizes_are_complete():
    module = load("02_tokenization", "run")
    assert len((ROOT / "02_tokenization" / "run.py").read_text().splitlines()) <= 150
    for size in ("tiny", "small", "medium", "large"):
        configure(module, size=size)


def test_tokenizer_and_shards_belong_together(tiny):
    directory, _ = tiny
    assert status(directory) == "finished"
    tokenizer = BPETokenizer.load(directory / "tokenizer.json")
    assert tokenizer.vocab_size == 512
    assert read_json(directory / "manifest.json")["tokenizer"] == tokenizer.fingerprint
    assert (directory / "tokenizer.vocab").exists()
    folders = sorted(path.parent.name for path in directory.rglob("shards.json"))
    assert folders == ["train", "validation-plays", "validation-sums", "validation-web", "validation-wiki"]
    for name in folders:
        shards = Shards.for_tokenizer(directory / name, tokenizer)
        text = tokenizer.decode(shards[:400].tolist())
        assert "\ufffd" not in text[:-3]


def test_validation_text_is_not_in_training(tiny):
    directory, _ = tiny
    tokenizer = BPETokenizer.load(directory / "tokenizer.json")
    train = tokenizer.decode(Shards(directory / "train")[:].tolist())
    held_out = tokenizer.decode(Shards(directory / "validation-plays")[:].tolist())
    spans = [held_out[i : i + 80] for i in range(0, len(held_out) - 80, 997)]
    assert sum(span in train for span in spans) / len(spans) < 0.01


def test_the_counted_pairs_are_those_of_the_shards(tiny):
    directory, summary = tiny
    shards = Shards(directory / "train")
    row = next(row for row in summary["numbers"] if row["name"] == "pairs lost, repeated or invented in an epoch")
    assert row["value"] == 0
    assert f"of {len(shards) - 1:,};" in row["note"]
    stream = BatchStream(shards, length=64, batch_size=8, end_of_text=shards.about["end_of_text"])
    assert sum(int(batch.loss_mask.sum()) for batch in stream.epoch_batches()) == len(shards) - 1


def test_mixture_and_cleaning_are_on_record(tiny):
    directory, summary = tiny
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in logged if "stage" in line] == [
        "normalise",
        "filter",
        "exact duplicates",
        "near duplicates",
        "decontaminate",
    ]
    shares = [row["value"] for row in summary["numbers"] if row["name"].startswith("mixture, ")]
    assert sum(shares) == pytest.approx(1.0)
