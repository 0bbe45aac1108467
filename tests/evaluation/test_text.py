"""Bits per byte against a count by hand, and against everything it must not depend on."""

import math

import pytest
import torch

import common.evaluation.text
from common.data.documents import Document
from common.evaluation.text import score_documents, shuffle_characters
from common.model.config import ModelConfig
from common.model.ngram import NaiveNGram, NGram
from common.model.output import Output
from common.model.transformer import Transformer

TEXTS = ["abracadabra", "né — 日本", "x", "barbara " * 40]


@pytest.fixture(scope="module")
def documents():
    return [Document(f"{i}", "even" if i % 2 == 0 else "odd", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(documents, tokenizer):
    return NGram.fit_documents(documents[:2], tokenizer, 4)


def test_equals_a_count_by_hand(documents, model, tokenizer):
    train = [[256, *text.encode(), 256] for text in TEXTS[:2]]
    naive = NaiveNGram(train, 4, 257)
    bits, size = 0.0, 0
    for text in TEXTS:
        raw = list(text.encode())
        for i, byte in enumerate(raw):
            bits -= math.log2(naive.probability([256, *raw[:i]], byte))
        size += len(raw)
    assert score_documents(model, tokenizer, documents).bits_per_byte().mean == pytest.approx(bits / size, rel=1e-5)


@pytest.mark.parametrize("length", [8, 9, 50, 4096])
def test_window_length_does_not_matter(documents, model, tokenizer, length):
    whole = score_documents(model, tokenizer, documents)
    found = score_documents(model, tokenizer, documents, length=length)
    assert found.nats == pytest.approx(whole.nats, rel=1e-6)
    assert found.bytes == whole.bytes == [len(text.encode()) for text in TEXTS]
    assert found.tokens == found.bytes


def test_order_of_documents_does_not_matter(documents, model, tokenizer):
    there, back = (score_documents(model, tokenizer, docs) for docs in (documents, documents[::-1]))
    assert there.nats == pytest.approx(back.nats[::-1], rel=1e-6)


def test_uniform_model_reads_log_v(documents, tokenizer):
    class Uniform:
        vocab_size, context_length = 257, 4

        def __call__(self, ids, **_):
            return Output(torch.zeros(*ids.shape, 257))

    score = score_documents(Uniform(), tokenizer, documents)
    assert score.bits_per_byte().mean == pytest.approx(math.log2(257), rel=1e-6)
    assert score.nats_per_byte().mean == pytest.approx(math.log(257), rel=1e-6)


class Shown:
    """A model that keeps what it is shown."""

    def __init__(self, model):
        self.model, self.shapes = model, []
        self.vocab_size, self.context_length, self.bounded = model.vocab_size, model.context_length, model.bounded

    def __call__(self, ids, **more):
        self.shapes.append(ids.shape)
        return self.model(ids, **more)


def small_transformer(context_length):
    config = ModelConfig(257, context_length, layers=1, width=8, heads=2, positions="learned", init="fan_in")
    return Transformer(config).eval()


@pytest.mark.parametrize("context_length", [1, 7, 16, 500])
def test_a_transformer_is_shown_its_context_and_no_more(documents, tokenizer, context_length):
    shown = Shown(small_transformer(context_length))
    score = score_documents(shown, tokenizer, documents)
    assert score.bytes == [len(text.encode()) for text in TEXTS], "every byte once"
    assert max(width for _, width in shown.shapes) == min(context_length, 321)


@torch.inference_mode()
def test_a_transformer_has_half_a_context_before_each_byte(documents, tokenizer):
    model, half, total = small_transformer(16), 8, []
    for document in documents:
        ids, nats = [256, *document.text.encode()], 0.0
        for t in range(1, len(ids)):  # token t, from the window that counts it
            start = max(0, (t - 1) // half - 1) * half
            nats -= float(model(torch.tensor([ids[start:t]])).logits[0, -1].log_softmax(0)[ids[t]])
        total.append(nats)
    assert score_documents(model, tokenizer, documents).nats == pytest.approx(total, rel=1e-4)


def test_a_long_context_is_cut_to_the_asked_length(documents, tokenizer):
    shown = Shown(small_transformer(500))
    assert sum(score_documents(shown, tokenizer, documents, length=32).bytes) == sum(len(t.encode()) for t in TEXTS)
    assert max(width for _, width in shown.shapes) == 32


def test_logits_of_a_batch_are_bounded(documents, model, tokenizer, monkeypatch):
    whole, shown = score_documents(model, tokenizer, documents), Shown(model)
    monkeypatch.setattr(common.evaluation.text, "LOGITS_AT_ONCE", 100 * 257)
    few = score_documents(shown, tokenizer, documents, length=20)
    assert few.nats == pytest.approx(whole.nats, rel=1e-6)
    assert 80 < max(rows * width for rows, width in shown.shapes) <= 100


def test_groups_add_up(documents, model, tokenizer):
    score = score_documents(model, tokenizer, documents)
    groups = score.by_group()
    assert set(groups) == {"even", "odd"}
    assert sum(sum(group.nats) for group in groups.values()) == pytest.approx(sum(score.nats))


def test_shuffling_keeps_the_letters_and_loses_the_order(documents):
    shuffled = shuffle_characters(documents, seed=1)
    assert [sorted(d.text) for d in shuffled] == [sorted(d.text) for d in documents]
    assert shuffled[3].text != documents[3].text
    assert shuffled == shuffle_characters(documents, seed=1) != shuffle_characters(documents, seed=2)


def test_empty_input_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="no documents"):
        score_documents(model, tokenizer, [])
    with pytest.raises(ValueError, match="hollow is empty"):
        score_documents(model, tokenizer, [Document("hollow", "g", "")])
