"""Killed at any moment and resumed, a training ends with the same bits; a snapshot is whole or passed over, or refused."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from common.foundation.files import read_json, write_json
from common.model.config import ModelConfig
from common.model.ngram import NGram
from common.model.recurrent import Recurrent
from common.model.transformer import Transformer
from common.training import snapshots as room
from common.training.checkpoint import load_checkpoint, load_tensors, save_checkpoint
from common.training.objectives import Masked
from common.training.snapshots import Snapshots, whole_tensors
from tests.training import tiny
from tests.training.tiny import CONFIG, V, Words, equal, losses_of, stream_of, trainer_of, weights_of


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children of a fork")
def test_killed_twenty_times_it_ends_with_the_same_bits(tmp_path):
    command, root = [sys.executable, "-m", "tests.training.killed", str(tmp_path)], Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stderr
    seen = read_json(tmp_path / "seen.json")
    assert len(seen) >= 10
    assert len({whole for whole, _ in seen}) >= 5, f"at different moments: {seen}"
    assert any(partial for _, partial in seen), f"some while saving: {seen}"
    rows = [read_json(tmp_path / name / "rows.json") for name in ("undisturbed", "killed")]
    assert len(rows[0]["history"]) == 80
    assert rows[0] == rows[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("undisturbed", "killed")]
    assert weights[0] == weights[1]


def saved(folder, *, until=None, keep=2, **options):
    """A trainer that saves every second of six updates."""
    options = {"steps": 6, "save_every": 2, "tokenizer": Words(), **options}
    return trainer_of(snapshots=Snapshots(folder, keep), **options).train(until)


def fresh(folder, keep=2, **options):
    """One that has not begun, with the same snapshots."""
    options = {"steps": 6, "save_every": 2, "tokenizer": Words(), **options}
    return trainer_of(snapshots=Snapshots(folder, keep), **options)


def state_of(trainer):
    """Everything that a refused snapshot must leave alone."""
    return json.dumps([trainer.progress_state(), {n: t.tolist() for n, t in room._tensors_of(trainer).items()}])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("changes", [{"dropout": 0.2}, {"experts": 4}, {"tied": False}], ids=str)
def test_resuming_repeats_every_bit(tmp_path, kind, changes):
    """Also dropout, the random objective, and the moments of the optimizer."""
    options = {
        "config": CONFIG.but(**changes), "kind": kind, "objective": Masked(30, V), "accumulate": 2,
        "evaluate": lambda model, done: {"x": float(model.embedding.weight.sum())}, "evaluate_every": 3,
    }  # fmt: skip
    whole = trainer_of(steps=6, **options).train()
    saved(tmp_path, until=4, **options)
    after = fresh(tmp_path, **options)
    assert after.resume()
    assert after.done == 4
    after.train()
    assert after.history == whole.history
    assert [row for row in after.evaluations if row["step"] != 4] == whole.evaluations
    assert equal(weights_of(after.model), weights_of(whole.model))
    assert equal(after.optimizers.state_tensors(), whole.optimizers.state_tensors())
    assert after.optimizers.counters() == whole.optimizers.counters()


def test_a_finished_training_is_not_done_again(tmp_path):
    first = saved(tmp_path)
    rows = []
    again = fresh(tmp_path, watch=rows.append, evaluate=lambda model, done: {"x": 1.0}).train()
    assert again.history == first.history == rows
    assert again.evaluations == []
    assert equal(weights_of(again.model), weights_of(first.model))


def test_the_newest_stay(tmp_path):
    saved(tmp_path)
    assert [path.name for path in Snapshots(tmp_path).all()] == ["step-00000006", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    with pytest.raises(ValueError, match="keep=0"):
        Snapshots(tmp_path, 0)


def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path, monkeypatch):
    trainer = saved(tmp_path, until=4, keep=1)
    trainer.update()
    for place in ("write_json", "save_checkpoint", "sha256_file"):
        with monkeypatch.context() as broken:
            broken.setattr(room, place, lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                trainer.save()
        assert [path.name for path in Snapshots(tmp_path).all()] == ["step-00000004"], place
        assert fresh(tmp_path).resume()
    moved = []
    with monkeypatch.context() as spied:
        replace = os.replace
        spied.setattr(room.os, "replace", lambda a, b: (moved.append(Snapshots(tmp_path).all()), replace(a, b)))
        trainer.save()
    assert [path.name for path in moved[-1]] == ["step-00000004"], "until the last move there is only the old one"
    assert [path.name for path in Snapshots(tmp_path).all()] == ["step-00000005"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flip", "unlink"])
@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "checkpoint.json", "progress.json"])
def test_a_damaged_one_is_passed_over(tmp_path, name, damage):
    whole = saved(tmp_path)
    path = tmp_path / "step-00000006" / name
    if name == "progress.json" and damage is not Path.unlink:
        path.write_bytes(path.read_bytes()[:-3])
    else:
        damage(path)
    after = fresh(tmp_path)
    with pytest.warns(UserWarning, match="snapshot passed over.*step-00000006"):
        assert after.resume()
    assert after.done == 4
    after.train()
    assert after.history == whole.history
    with warnings.catch_warnings(action="error"):
        assert fresh(tmp_path).resume(), "the damaged one has been replaced"


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_does_not_push_out_what_is_whole(tmp_path, keep):
    saved(tmp_path, until=4, keep=2)
    flip(tmp_path / "step-00000004" / "model.safetensors")
    with pytest.warns(UserWarning, match="passed over"):
        saved(tmp_path, until=3, keep=keep)
    after = fresh(tmp_path, keep)
    with pytest.warns(UserWarning, match="passed over"):
        assert after.resume()
    assert after.done == 3


def test_all_damaged_is_a_new_beginning(tmp_path):
    whole = saved(tmp_path)
    for path in Snapshots(tmp_path).all():
        flip(path / "training.safetensors")
    with pytest.warns(UserWarning, match="passed over"):
        assert losses_of(fresh(tmp_path).train()) == losses_of(whole)


def test_a_partial_folder_is_not_a_snapshot(tmp_path):
    whole = saved(tmp_path, until=4)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / ".step-00000006.partial")
    (tmp_path / ".step-00000006.partial" / "old").write_text("left over")
    (tmp_path / "step-notes").mkdir()
    after = fresh(tmp_path)
    with warnings.catch_warnings(action="error"):
        assert after.resume()
    assert after.done == whole.done == 4
    after.train()
    assert not (tmp_path / "step-00000006" / "old").exists()
    assert not list(tmp_path.glob(".*"))


def test_none_is_false(tmp_path):
    assert not fresh(tmp_path / "nothing").resume()


LARGER = CONFIG.but(vocab_size=V + 1)
OTHERS = {
    "tokenizer": ({"tokenizer": Words("other words")}, "tokenizer words, 31 of….*other words"),
    "vocabulary": ({"config": LARGER}, "'vocab_size': 31.*'vocab_size': 32"),
    "heads": ({"config": CONFIG.but(heads=4)}, "'heads': 2.*'heads': 4"),
    "optimizer": ({"kind": "muon"}, "attention.key.weight/first is .16, 16. in the snapshot and missing here"),
    "seed of the stream": ({"stream": stream_of(seed=5)}, "another stream.*'seed': 0.*'seed': 5"),
    "tokens": ({"stream": stream_of(count=900)}, "another stream.*'tokens': 1601.*'tokens': 900"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_is_refused_with_both_sides_and_nothing_is_changed(tmp_path, what):
    saved(tmp_path, until=4)
    options, message = OTHERS[what]
    other = fresh(tmp_path, **options)
    before = state_of(other)
    with pytest.raises(ValueError, match=message):
        other.resume()
    assert state_of(other) == before


def test_another_number_of_groups_is_refused(tmp_path):
    saved(tmp_path, until=2)
    with pytest.raises(ValueError, match="3 groups of parameters, the optimizer here 4"):
        other = fresh(tmp_path)
        other.optimizers.groups.append({})
        other.resume()


class Compiled(nn.Module):
    """What torch.compile makes, as far as names go."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, *args, **options):
        return self._orig_mod(*args, **options)


def test_a_wrapper_saves_clean_names(tmp_path):
    whole = saved(tmp_path / "a")
    for wrapped in (Compiled(Transformer(CONFIG, seed=1)), Compiled(Compiled(Transformer(CONFIG, seed=1)))):
        trainer = saved(tmp_path / "b", model=wrapped)
        assert losses_of(trainer) == losses_of(whole)
        for name in ("model.safetensors", "training.safetensors"):
            a, b = ((tmp_path / which / "step-00000006" / name).read_bytes() for which in "ab")
            assert a == b
        assert whole_tensors(wrapped).keys() == whole_tensors(whole.model).keys()
        shutil.rmtree(tmp_path / "b")
    saved(tmp_path / "c", until=2)
    mixed = fresh(tmp_path / "c", model=Compiled(Transformer(CONFIG, seed=1))).train()
    assert losses_of(mixed) == losses_of(whole)


def ngram():
    return NGram.fit([torch.tensor(tiny.tokens_of(300))], 3, V)


MODELS = {
    "tied": lambda: Transformer(CONFIG, seed=2),
    "untied": lambda: Transformer(CONFIG.but(tied=False), seed=2),
    "experts": lambda: Transformer(CONFIG.but(experts=4), seed=2),
    "gpt2": lambda: Transformer(
        ModelConfig.preset("gpt2", vocab_size=V, context_length=16, layers=1, width=16, heads=2), seed=2
    ),
    "lstm": lambda: Recurrent("lstm", V, 8, 2, seed=2),
    "rnn": lambda: Recurrent("rnn", V, 8, seed=2),
    "ngram": ngram,
}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_round_trip(tmp_path, name):
    model = MODELS[name]()
    if name != "ngram":
        for p in model.parameters():  # so that nothing is at its initial value
            p.data.add_(torch.linspace(0, 1, p.numel()).view(p.shape))
        model.eval()
    back = load_checkpoint(save_checkpoint(tmp_path, model, Words()), Words())
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert type(back) is type(model)
    if name != "ngram":
        assert not back.training
        assert equal(weights_of(back), weights_of(model))
    if name == "tied":
        assert back.head.weight is back.embedding.weight
        assert "head.weight" not in safetensors.torch.load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {f"_orig_mod.{name}": x for name, x in t.items()},
            "20 missing.*such as blocks.0.*20 unknown.*such as _orig_mod.blocks.0",
        ),
        (lambda t: {n: x for n, x in t.items() if n != "blocks.1.mlp.up.weight"}, "1 missing.*blocks.1.mlp.up.weight"),
        (lambda t: {**t, "extra": torch.zeros(1)}, "1 unknown to the model, such as extra"),
        (
            lambda t: {**t, "embedding.weight": torch.zeros(V + 1, 16)},
            r"\(32, 16\) in the file and \(31, 16\) in the model",
        ),
    ],
    ids=["prefix", "missing", "unexpected", "shape"],
)
def test_names_and_shapes_are_strict(change, message):
    model = Transformer(CONFIG)
    before, tensors = weights_of(model), {name: t + 1 for name, t in weights_of(model).items()}
    with pytest.raises(ValueError, match=message):
        load_tensors(model, change(tensors), "here")
    assert equal(weights_of(model), before)
    load_tensors(model, tensors, "here")
    assert equal(weights_of(model), tensors)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path, Transformer(CONFIG), Words())
    cut(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cut off or altered"):
        load_checkpoint(tmp_path, Words())
    described = read_json(tmp_path / "checkpoint.json")
    write_json(tmp_path / "checkpoint.json", {**described, "tokenizer": "another"})
    with pytest.raises(ValueError, match="another.*words, 31 o"):
        load_checkpoint(tmp_path, Words())


def test_what_cannot_be_described_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="a Linear cannot be saved"):
        save_checkpoint(tmp_path, nn.Linear(2, 2), Words())
