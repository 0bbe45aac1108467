import pytest
import torch

from common.foundation.files import read_json, write_json
from common.model.ngram import NGram
from common.tokenization.byte import ByteTokenizer
from common.training.checkpoint import load_checkpoint, model_fingerprint, save_checkpoint


@pytest.fixture
def folder(tmp_path, adder, tokenizer):
    return save_checkpoint(tmp_path / "model", adder.model, tokenizer)


def test_round_trip_is_exact(folder, adder, tokenizer):
    loaded = load_checkpoint(folder, tokenizer)
    ids = torch.randint(256, (2, 12))
    assert torch.equal(loaded(ids).logits, adder.model(ids).logits)
    assert model_fingerprint(loaded) == model_fingerprint(adder.model)


def test_fingerprint_sees_one_count(adder):
    before = model_fingerprint(adder.model)
    counts = adder.model.level(2)[3]
    counts[0] += 1
    changed = model_fingerprint(adder.model)
    counts[0] -= 1
    assert before == model_fingerprint(adder.model) != changed


def test_fingerprint_sees_class_and_vocabulary(adder):
    class Other(NGram):
        pass

    levels = [NGram.fit([torch.tensor([0, 1, 1])], 1, 2).levels()[0]]
    prints = {model_fingerprint(kind(size, levels)) for kind in (NGram, Other) for size in (2, 3)}
    assert len(prints) == 4
    half = torch.nn.Linear(2, 2).bfloat16()
    half.vocab_size = 2
    assert model_fingerprint(half)


def test_another_tokenizer_is_refused_and_both_sides_named(folder, tokenizer):
    other = ByteTokenizer(["<other>"])
    with pytest.raises(ValueError, match=f"{tokenizer.fingerprint[:12]}.*{other.fingerprint[:12]}"):
        load_checkpoint(folder, other)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100], lambda b: b[:-1] + b"\0\0", lambda b: b""])
def test_damaged_tensors_are_refused(folder, tokenizer, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="cut off or altered"):
        load_checkpoint(folder, tokenizer)


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors"])
def test_a_missing_part_is_named(folder, tokenizer, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_checkpoint(folder, tokenizer)


def test_an_unknown_kind_is_refused(folder, tokenizer):
    described = read_json(folder / "checkpoint.json")
    write_json(folder / "checkpoint.json", {**described, "model": {"kind": "oracle"}})
    with pytest.raises(ValueError, match="kind 'oracle'"):
        load_checkpoint(folder, tokenizer)
