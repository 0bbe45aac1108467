"""Bits per byte against a count by hand, and against everything it must not depend on."""

import math

import pytest
import torch

from common.data.documents import Document
from common.evaluation.text import score_documents, shuffle_characters
from common.model.ngram import NaiveNGram, NGram
from common.model.output import Output

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
