"""Corners that a review found: each was wrong once."""

import pytest
import torch

from common.model.attention import AttentionContext
from common.model.attention_heads import induction_score, without_heads
from common.model.config import ModelConfig
from common.model.masks import attention_mask, document_starts, positions_of
from common.model.mlp import MixtureOfExperts
from common.model.recurrent import Recurrent
from common.model.transformer import Transformer

TINY = ModelConfig(vocab_size=23, context_length=16, layers=2, width=16, heads=4, init="fan_in")
LATENT = {"attention": "latent", "latent_width": 6, "rope_head_width": 4, "value_head_width": 4}


def ids_of(rows=2, length=9, seed=0):
    return torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("init", ["gpt2", "fan_in", "zero_output"])
@pytest.mark.parametrize("changes", [{}, LATENT, {"experts": 4}, {"qk_norm": True, "attention_bias": True}])
def test_every_parameter_learns_whatever_the_initialisation(init, changes):
    model = Transformer(TINY.but(init=init, **changes))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):  # with zero outputs the rest of a branch gets its first gradient one step later
        optimizer.zero_grad()
        model(ids_of(seed=step)).logits.logsumexp(-1).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@torch.no_grad()
def test_positions_that_are_given_are_those_that_are_used():
    model, ids = Transformer(TINY).eval(), ids_of(1)
    mixed = torch.tensor([[0, 7, 6, 5, 4, 3, 2, 1, 8]])
    one, two = model(ids, positions=mixed).logits, model(ids.expand(2, -1), positions=mixed.expand(2, -1)).logits
    torch.testing.assert_close(one[0], two[0])
    assert not torch.allclose(one, model(ids).logits)
    with pytest.raises(ValueError, match="start at 0"):
        model(ids, positions=mixed - 5)
    for changes in ({"window": 3}, {"positions": "alibi"}):
        with pytest.raises(ValueError, match="leave `positions` out"):
            Transformer(TINY.but(**changes))(ids, positions=mixed)


def test_documents_are_runs_of_ids_and_padding_has_none():
    documents = torch.tensor([[1, 1, -1, 1, 2, 2, 1, 1]])
    pads = documents == -1
    assert document_starts(documents, pads).int().tolist() == [[1, 0, 0, 0, 1, 0, 1, 0]]
    assert positions_of(documents, pads).tolist() == [[0, 1, 1, 2, 0, 1, 0, 1]]
    mask = attention_mask(documents, pad_mask=pads)[0]
    assert mask[3].int().tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert mask[7].int().tolist() == [0, 0, 0, 0, 0, 0, 1, 1], "an id that comes back is a new document"


@pytest.mark.parametrize("make", [lambda: Transformer(TINY), lambda: Recurrent("lstm", 23, width=8)])
@torch.no_grad()
def test_padding_between_documents_does_not_join_them(make):
    model, ids = make().eval(), ids_of(1)
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2, 2]])
    pads = torch.zeros(1, 9, dtype=torch.bool)
    pads[0, 3] = True
    whole = model(ids, document_ids=documents, pad_mask=pads).logits
    torch.testing.assert_close(whole[:, 4:], model(ids[:, 4:]).logits, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_tokens_without_ids_continue_the_last_real_document():
    model, ids = Transformer(TINY).eval(), ids_of(1)
    cache = model.new_cache(1)
    documents, pads = torch.tensor([[1, 2, 2, -1]]), torch.tensor([[False, False, False, True]])
    model(ids[:, :4], cache=cache, document_ids=documents, pad_mask=pads)
    later = model(ids[:, 4:], cache=cache).logits
    alone = model(ids[:, [1, 2, 4, 5, 6, 7, 8]]).logits[:, 2:]
    torch.testing.assert_close(later, alone, atol=1e-5, rtol=1e-4)


def test_a_cache_works_in_either_mode_in_half_the_bytes_and_for_its_own_model_only():
    model, ids = Transformer(TINY).eval(), ids_of()
    with torch.inference_mode():
        cache = model.new_cache(2)
        half = model.new_cache(2, dtype=torch.bfloat16)
    with torch.no_grad():
        for size in (4, 1, 4):
            start = cache.length
            whole = model(ids[:, start : start + size], cache=cache).logits
            rounded = model(ids[:, start : start + size], cache=half).logits
            torch.testing.assert_close(whole, rounded, atol=0.2, rtol=0.2)
        torch.testing.assert_close(whole, model(ids).logits[:, 5:], atol=1e-5, rtol=1e-4)
        assert half.nbytes * 2 == cache.nbytes
        with pytest.raises(ValueError, match="another config"):
            Transformer(TINY.but(layers=1))(ids, cache=model.new_cache(2))


@torch.inference_mode()
def test_decoding_goes_on_past_the_table():
    model, ids = Transformer(TINY).eval(), ids_of(1, 70)
    cache = model.new_cache(1, 80)
    made = torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(70)], dim=1)
    torch.testing.assert_close(made, Transformer(TINY).eval()(ids).logits, atol=1e-4, rtol=1e-3)


def test_nothing_but_padding_gives_numbers():
    pads = torch.ones(2, 9, dtype=torch.bool)
    model = Transformer(TINY.but(experts=4, z_loss=0.1))
    assert float(model(ids_of(), pad_mask=pads).aux["penalty"].detach()) == 0.0
    module = MixtureOfExperts(TINY.but(experts=4))
    assert module.router(torch.zeros(0, 16)).shape == (0, 4)


@pytest.mark.parametrize("changes", [{}, LATENT, {"window": 3}])
def test_empty_batches_and_texts_keep_their_shape(changes):
    model = Transformer(TINY.but(**changes)).eval()
    for shape in ((0, 5), (2, 0)):
        assert model(torch.zeros(shape, dtype=torch.int64)).logits.shape == (*shape, 23)
    assert Recurrent("rnn", 23, width=8)(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, 0, 23)


def test_dropout_has_its_four_places():
    model = Transformer(TINY.but(dropout=0.5, layers=1))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        right = torch.nn.functional.dropout
        patch.setattr(torch.nn.functional, "dropout", lambda x, p: seen.append("x") or right(x, p))
        kernel = torch.nn.functional.scaled_dot_product_attention
        spy = lambda *a, dropout_p=0.0, **k: seen.append(dropout_p) or kernel(*a, dropout_p=dropout_p, **k)  # noqa: E731
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(ids_of())
        assert seen == ["x", 0.5, "x", "x"]
        seen.clear()
        model.eval()(ids_of())
        assert seen == [0.0]


def test_heads_that_do_not_exist_and_scores_of_nothing():
    model = Transformer(TINY)
    for head in ((0, 4), (2, 0), (0, -1)):
        with pytest.raises(ValueError, match="no head"), without_heads(model, [head]):
            pass
    with pytest.raises(ValueError, match="nothing to look up"):
        induction_score(torch.eye(4)[None, None], torch.arange(4)[None])


def test_absorbed_is_chosen_when_the_cache_holds_tokens():
    model, ids, forms = Transformer(TINY.but(**LATENT)).eval(), ids_of(), []
    attention = model.blocks[0].attention
    for name in ("_expanded", "_absorbed"):
        right = getattr(attention, name)
        setattr(attention, name, lambda *a, name=name, right=right: forms.append(name) or right(*a))
    with torch.inference_mode():
        cache = model.new_cache(2)
        model(ids[:, :8], cache=cache)
        model(ids[:, 8:], cache=cache)
    assert forms == ["_expanded", "_absorbed"]
    assert AttentionContext().cache is None
