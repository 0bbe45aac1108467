"""Attention against torch's own, its naive form against its fused one, and every mask against brute force."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from common.model.attention import Attention, AttentionContext, attend, attend_naive
from common.model.config import ModelConfig
from common.model.masks import attention_mask, causal_mask, positions_of


def tensors(*shape, count=3, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for _ in range(count)]


def inputs(batch, heads, groups, queries, keys, width, value_width):
    (q,) = tensors(batch, heads, queries, width, count=1)
    (k,) = tensors(batch, groups, keys, width, count=1, seed=1)
    (v,) = tensors(batch, groups, keys, value_width, count=1, seed=2)
    return q, k, v


def gradients(out, parameters):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((out * weights).sum(), parameters)


SHAPES = [
    (2, 4, 4, 7, 7, 5, 5),
    (1, 6, 2, 3, 11, 8, 8),
    (3, 4, 1, 1, 9, 4, 4),
    (2, 3, 3, 5, 5, 6, 10),
    (1, 2, 1, 6, 6, 1, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["causal", "mask", "bias"])
def test_naive_and_fused_agree_in_output_and_every_gradient(shape, kind):
    q, k, v = inputs(*shape)
    batch, heads, _, queries, keys = shape[:5]
    more = {}
    if kind == "mask":
        random = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(3)) < 0.6
        more["mask"] = random & causal_mask(queries, keys)  # some rows see nothing
    if kind == "bias":
        more["bias"] = tensors(batch, heads, queries, keys, count=1, seed=4, grad=False)[0]
        more["mask"] = causal_mask(queries, keys)[None, None]
    slow, weights = attend_naive(q, k, v, **more)
    fast = attend(q, k, v, **more)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(fast, (q, k, v)), gradients(slow, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    total = weights.sum(-1)
    seeing = more.get("mask", causal_mask(queries, keys)).any(-1).expand_as(total)
    torch.testing.assert_close(total, seeing.float())


def test_equal_to_torch_sdpa_with_its_own_causal_flag():
    q, k, v = inputs(2, 4, 4, 9, 9, 6, 6)
    ours, theirs = attend_naive(q, k, v)[0], F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_causal_with_fewer_queries_than_keys_is_aligned_at_the_end():
    q, k, v = inputs(2, 4, 2, 9, 9, 6, 6)
    whole = attend(q, k, v)
    torch.testing.assert_close(attend(q[:, :, 6:], k, v), whole[:, :, 6:])
    torch.testing.assert_close(attend(q[:, :, 8:], k, v), whole[:, :, 8:])
    with pytest.raises(ValueError, match="only 3 keys"):
        causal_mask(4, 3)


@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_multihead_attention_of_torch(bias):
    config = ModelConfig(vocab_size=9, width=12, heads=3, attention_bias=bias, positions="none")
    ours = Attention(config)
    theirs = torch.nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.out_proj.weight.copy_(ours.output.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
            theirs.out_proj.bias.copy_(ours.output.bias)
    (x,) = tensors(2, 7, 12, count=1)
    blocked = ~causal_mask(7)  # theirs is True where a query may not see
    there = theirs(x, x, x, attn_mask=blocked, need_weights=False)[0]
    torch.testing.assert_close(ours(x), there, atol=1e-6, rtol=1e-5)
    mine, other = gradients(ours(x), (x,)), gradients(there, (x,))
    torch.testing.assert_close(mine[0], other[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "heads", "groups", "head_width"), [(12, 3, 3, None), (10, 4, 2, 6), (7, 4, 1, 8)])
def test_module_on_shapes_where_nothing_is_square(width, heads, groups, head_width):
    config = ModelConfig(
        vocab_size=9, width=width, heads=heads, key_value_heads=groups, head_width=head_width, positions="none"
    )
    module = Attention(config)
    (x,) = tensors(2, 5, width, count=1)
    weights = []
    slow = module(x, AttentionContext(weights=weights))
    torch.testing.assert_close(module(x), slow, atol=1e-6, rtol=1e-5)
    assert weights[0].shape == (2, heads, 5, 5)


def test_grouped_heads_are_multi_head_with_repeated_weights():
    few = Attention(ModelConfig(vocab_size=9, width=12, heads=4, key_value_heads=2, positions="none"))
    many = Attention(ModelConfig(vocab_size=9, width=12, heads=4, positions="none"))
    with torch.no_grad():
        many.query.weight.copy_(few.query.weight)
        many.output.weight.copy_(few.output.weight)
        for name in ("key", "value"):
            by_head = getattr(few, name).weight.view(2, 3, 12)
            getattr(many, name).weight.copy_(by_head[[0, 0, 1, 1]].reshape(12, 12))
    (x,) = tensors(2, 5, 12, count=1)
    torch.testing.assert_close(few(x), many(x), atol=1e-6, rtol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    q, k, v = inputs(2, 2, 2, 4, 4, 3, 3)
    mask = causal_mask(4)[None, None].clone()
    mask[:, :, 2] = False
    bias = torch.zeros(2, 2, 4, 4)
    for more in ({"mask": mask}, {"mask": mask, "bias": bias}):
        for out in (attend_naive(q, k, v, **more)[0], attend(q, k, v, **more)):
            assert (out[:, :, 2] == 0).all()
            assert all(g.isfinite().all() for g in gradients(out, (q, k, v)))


def test_scores_keep_their_spread_when_heads_grow_wider():
    def entropy(width, scale):
        q, k, v = inputs(4, 2, 2, 64, 64, width, width)
        weights = attend_naive(q, k, v, scale=scale)[1][:, :, -1]
        return float(-(weights * weights.clamp(min=1e-30).log()).sum(-1).mean().detach())

    assert entropy(256, None) == pytest.approx(entropy(16, None), abs=0.2)
    assert entropy(256, 1.0) < 0.3 * entropy(256, None)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_attention_mask_is_what_its_rules_say(data):
    batch, keys = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    queries = data.draw(st.integers(0, keys))
    documents = [sorted(data.draw(st.lists(st.integers(0, 2), min_size=keys, max_size=keys))) for _ in range(batch)]
    pads = [data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys)) for _ in range(batch)]
    window = data.draw(st.none() | st.integers(1, 4))
    document_ids = torch.tensor(documents) if data.draw(st.booleans()) else None
    pad_mask = torch.tensor(pads) if document_ids is None or data.draw(st.booleans()) else None
    positions = positions_of(document_ids, pad_mask)
    mask = attention_mask(document_ids, pad_mask=pad_mask, positions=positions, window=window, queries=queries)
    for b in range(batch):
        real = [pad_mask is None or not pads[b][s] for s in range(keys)]
        document = documents[b] if document_ids is not None else [0] * keys
        for t in range(queries):
            q = keys - queries + t
            for k in range(keys):
                between = sum(real[k + 1 : q + 1]) if k <= q else 0  # real tokens from k (not counted) to q (counted)
                sees = k <= q and document[q] == document[k] and real[q] and real[k]
                sees = sees and (window is None or between < window)
                assert bool(mask[b, t, k]) == sees, (b, t, k)


def test_positions_count_real_tokens_from_zero_in_each_document():
    documents = torch.tensor([[5, 5, 5, 7, 7, 7]])
    pads = torch.tensor([[True, False, False, False, True, False]])
    assert positions_of(documents).tolist() == [[0, 1, 2, 0, 1, 2]]
    assert positions_of(documents, pads).tolist() == [[0, 0, 1, 0, 0, 1]]
    assert positions_of(None, pads).tolist() == [[0, 0, 1, 2, 2, 3]]


def test_masks_say_what_they_need():
    with pytest.raises(ValueError, match="causal_mask needs none"):
        attention_mask()
    with pytest.raises(ValueError, match="positions"):
        attention_mask(torch.zeros(1, 3, dtype=torch.int64), window=2)


def test_scale_is_that_of_the_config():
    (x,) = tensors(1, 4, 8, count=1)
    config = ModelConfig(vocab_size=9, width=8, heads=2, positions="none")
    one, other = Attention(config), Attention(config.but(attention_scale=0.1))
    other.load_state_dict(one.state_dict())
    assert not torch.allclose(one(x), other(x))
    same = Attention(config.but(attention_scale=1 / math.sqrt(4)))
    same.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x), same(x))
