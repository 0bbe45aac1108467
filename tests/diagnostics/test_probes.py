"""Probes on models and harnesses that are not ours."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.diagnostics.doctor import doctor
from common.diagnostics.probes import by_name
from common.diagnostics.sources import MarkovSource


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def test_a_hugging_face_model_is_healthy(gpt2):
    found = doctor(gpt2, 61)
    assert set(found.readings) >= {"repeatable", "future-perturbation", "cross-row", "cached-equals-uncached"}
    assert found.healthy, str(found)
    assert "bits_per_byte" in str(found), "says which handles would run more"


def test_dropout_left_on_is_seen(gpt2):
    gpt2.train()
    try:
        assert not doctor(gpt2, 61).healthy
    finally:
        gpt2.eval()


def test_a_leak_of_one_token_is_seen(gpt2):
    def leaking(ids):
        return gpt2(ids).logits + torch.nn.functional.one_hot(ids.roll(-1, dims=1), 61)

    assert doctor(leaking, 61).readings["future-perturbation"].caught


def test_mixing_across_the_batch_is_seen(gpt2):
    def mixing(ids):
        logits = gpt2(ids).logits
        return logits + logits.mean(dim=0, keepdim=True)

    assert doctor(mixing, 61).readings["cross-row"].caught


def test_entropy_rate_of_the_source_is_right():
    source = MarkovSource(symbols="abcd", seed=3)
    (text,) = source.texts(1, 200_000, seed=1)
    codes = np.array([source.symbols.index(c) for c in text])
    bits = -np.log2(source.transitions[codes[:-1], codes[1:]])
    assert bits.mean() == pytest.approx(source.entropy_rate, abs=0.01)
    frequencies = np.bincount(codes, minlength=4) / len(codes)
    assert frequencies == pytest.approx(source.stationary, abs=0.01)


def test_a_source_of_fair_coins_has_one_bit():
    source = MarkovSource(symbols="ab", concentration=1e6)
    assert source.entropy_rate == pytest.approx(1.0, abs=1e-3)


def test_infinite_logits_hide_nothing(gpt2):
    def padded(ids, leak=0.0):
        logits = gpt2(ids).logits + leak * torch.nn.functional.one_hot(ids.roll(-1, dims=1), 61)
        return torch.cat([logits, torch.full((*ids.shape, 3), -torch.inf)], dim=-1)

    assert doctor(padded, 61).healthy
    assert doctor(lambda ids: padded(ids, leak=1.0), 61).readings["future-perturbation"].caught
    assert not doctor(lambda ids: padded(ids) * torch.nan, 61).healthy, "NaN is caught"


@pytest.mark.parametrize("late", [3, 9, 14])
def test_a_leak_at_one_place_only_is_seen(gpt2, late):
    def leaking(ids):
        logits = gpt2(ids).logits.clone()
        logits[:, late] += torch.nn.functional.one_hot(ids[:, late + 1], 61)
        return logits

    assert doctor(leaking, 61).readings["future-perturbation"].caught


def test_a_leak_from_the_first_row_only_is_seen(gpt2):
    def leaking(ids):
        logits = gpt2(ids).logits
        return logits + logits[:1]

    assert doctor(leaking, 61).readings["cross-row"].caught


@pytest.mark.parametrize("ids", [torch.full((4, 16), 7), torch.tensor([[1, 2]]), torch.tensor([[1], [2]])])
def test_inputs_that_can_show_nothing_are_an_alarm_not_an_ok(gpt2, ids):
    assert not doctor(gpt2, 61, ids=ids).healthy


def test_truncation_notices_that_plain_json_accepts_a_changed_letter():
    import json

    reading = by_name("truncation")(
        save=lambda path: path.write_text(json.dumps({"digest": hash("x" * 9), "text": "x" * 9})),
        load=lambda path: json.loads(path.read_text()),
    )
    assert reading.value == 1, "cut JSON does not parse, but a changed letter inside it does"


def test_answer_attacks_on_a_strict_grader():
    gold = {"2+2=": "4"}
    strict = by_name("answer-attacks")(accuracy=lambda answer: float(answer("2+2=") == "4"), solver=gold.get)
    assert not strict.caught
