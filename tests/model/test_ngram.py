"""The fast model against the formula, and what any language model must hold to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.documents import Document
from common.model.ngram import NaiveNGram, NGram

V = 7
sequences = st.lists(st.lists(st.integers(0, V - 1), min_size=2, max_size=30), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(train=sequences, query=st.lists(st.integers(0, V - 1), min_size=1, max_size=12), order=st.integers(1, 6))
def test_fast_equals_naive(train, query, order):
    naive = NaiveNGram(train, order, V)
    fast = NGram.fit([torch.tensor(ids) for ids in train], order, V)
    found = fast(torch.tensor([query])).logits[0].double().exp()
    for t in range(len(query)):
        expected = [naive.probability(query[: t + 1], token) for token in range(V)]
        assert found[t].tolist() == pytest.approx(expected, abs=1e-6)
        assert sum(expected) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    return NGram.fit([torch.randint(V, (400,), generator=generator) for _ in range(3)], 4, V)


def test_worked_example():
    """In d a b a b a: count(a) = 2, types(a) = 1, so P(b | a) = (2 + P(b)) / 3, and P(b) = (2 + 2 / 4) / 7."""
    a, b, d = 0, 1, 3
    model = NGram.fit([torch.tensor([d, a, b, a, b, a])], 2, 4)
    p_b = (2 + 2 / 4) / (5 + 2)  # followers of anything: a b a b a, two types
    assert model(torch.tensor([[a]])).logits.exp()[0, 0, b].item() == pytest.approx((2 + 1 * p_b) / (2 + 1), abs=1e-6)


def test_lower_orders_are_contained(model):
    generator = torch.Generator().manual_seed(0)
    train = [torch.randint(V, (400,), generator=generator) for _ in range(3)]
    ids = torch.randint(V, (2, 20))
    for order in range(1, 5):
        assert torch.equal(model.truncated(order)(ids).logits, NGram.fit(train, order, V)(ids).logits)
    with pytest.raises(ValueError, match="contains the orders 1 to 4, not 5"):
        model.truncated(5)


def test_causal_and_row_independent(model):
    ids = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(1))
    before = model(ids).logits
    for t in range(11):
        changed = ids.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % V
        assert torch.equal(model(changed).logits[:, : t + 1], before[:, : t + 1])
    changed = ids.clone()
    changed[0] = (changed[0] + 1) % V
    assert torch.equal(model(changed).logits[1:], before[1:])


def test_left_padding_changes_nothing(model):
    ids = torch.randint(V, (1, 9))
    for pads in (1, 2, 5):
        padded = torch.cat([torch.full((1, pads), 3), ids], dim=1)
        mask = torch.arange(9 + pads)[None] < pads
        assert torch.equal(model(padded, pad_mask=mask).logits[:, pads:], model(ids).logits)


def test_a_token_sees_only_its_own_document(model):
    first, second = torch.randint(V, (1, 6)), torch.randint(V, (1, 8))
    both = torch.cat([first, second], dim=1)
    document_ids = torch.tensor([[0] * 6 + [1] * 8])
    packed = model(both, document_ids=document_ids).logits
    assert torch.equal(packed[:, 6:], model(second).logits)
    assert torch.equal(packed[:, :6], model(first).logits)


def test_only_the_context_length_matters(model):
    ids = torch.randint(V, (1, 30))
    window = ids[:, -model.context_length :]
    assert torch.equal(model(ids).logits[:, -1], model(window).logits[:, -1])


def test_contexts_do_not_reach_across_training_documents():
    model = NGram.fit([torch.tensor([0, 1]), torch.tensor([2, 3])], 3, 4)
    assert len(model.level(1)[0]) == 2, "0 before 1, 2 before 3; nothing after 1"


def test_state_dict_rebuilds_the_model(model):
    names = ("keys", "offsets", "tokens", "counts")
    state = model.state_dict()
    again = NGram(V, [{name: state[f"level{k}_{name}"] for name in names} for k in range(4)])
    ids = torch.randint(V, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("train", "order", "message"),
    [
        ([[1, 2]], 0, "order must be at least 1"),
        ([[1]], 2, "nothing to count"),
        ([[1, 9]], 2, "outside a vocabulary of 7"),
        ([[1, -1]], 2, "outside a vocabulary of 7"),
    ],
)
def test_bad_training_data(train, order, message):
    with pytest.raises(ValueError, match=message):
        NGram.fit([torch.tensor(ids) for ids in train], order, V)


def test_bad_input(model):
    with pytest.raises(ValueError, match="another tokenizer"):
        model(torch.tensor([[V]]))
    with pytest.raises(ValueError, match=r"shape \(B, T\)"):
        model(torch.tensor([1, 2]))


def test_cost_of_the_model(model, tokenizer):
    assert model.num_parameters() == sum(len(model.level(k)[3]) for k in range(4))
    assert model.flops_per_token() == 4 * 4 * V
    text = NGram.fit_documents([Document("a", "a", "abab")], tokenizer, 2)
    assert text.vocab_size == tokenizer.vocab_size
