"""Cached equals uncached: every split point, chunk size, ragged batch, window, position scheme, reuse and overflow."""

import itertools

import pytest
import torch

from common.model.cache import Cache
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from tests.model.kinds import KINDS

TINY = {"vocab_size": 23, "context_length": 32, "layers": 2, "width": 16, "heads": 4, "init": "fan_in"}
T = 11
by_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind):
    return Transformer(ModelConfig(**{**TINY, **KINDS[kind]}), seed=1).eval()


def ids_of(batch=2, length=T, seed=0):
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(seed))


def in_chunks(model, cache, ids, sizes, **more):
    """Logits of the chunks, put together. Keyword tensors (B, T) are cut in the same way."""
    logits, start = [], 0
    for size in sizes:
        cut = {name: value[:, start : start + size] for name, value in more.items()}
        logits.append(model(ids[:, start : start + size], cache=cache, **cut).logits)
        start += size
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@by_kind
@torch.inference_mode()
def test_every_split_point_and_chunk_size(kind):
    model, ids = model_of(kind), ids_of()
    whole = model(ids).logits
    for first in range(1, T):
        close(in_chunks(model, model.new_cache(2, T), ids, [first, T - first]), whole)
    for size in (1, 2, 3, 5):
        sizes = [size] * (T // size) + ([T % size] if T % size else [])
        close(in_chunks(model, model.new_cache(2), ids, sizes), whole)


@by_kind
@torch.inference_mode()
def test_ragged_prompts_padded_on_either_side_then_decoded(kind):
    model, lengths, more = model_of(kind), [2, 7, 5], 4
    texts = [ids_of(1, length + more, seed=i)[0] for i, length in enumerate(lengths)]
    for side in ("left", "right"):
        width = max(lengths)
        ids, pads = torch.zeros(3, width + more, dtype=torch.int64), torch.zeros(3, width + more, dtype=torch.bool)
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            place = slice(width - length, width) if side == "left" else slice(0, length)
            ids[row, place] = text[:length]
            pads[row, :width] = True
            pads[row, place] = False
            ids[row, width:] = text[length:]
        cache = model.new_cache(3)
        logits = in_chunks(model, cache, ids, [width, 1, 1, 2], pad_mask=pads)
        for row, text in enumerate(texts):
            close(logits[row][~pads[row]], model(text[None]).logits[0])


@by_kind
@torch.inference_mode()
def test_packed_documents_in_chunks_equal_each_document_alone(kind):
    model, ids = model_of(kind), ids_of(1)
    documents = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]])
    apart = torch.cat([model(ids[:, a:b]).logits for a, b in ((0, 3), (3, 5), (5, 11))], dim=1)
    close(model(ids, document_ids=documents).logits, apart)
    for sizes in ([4, 7], [1] * T, [3, 2, 6]):
        close(in_chunks(model, model.new_cache(1), ids, sizes, document_ids=documents), apart)


@by_kind
@torch.inference_mode()
def test_reuse_after_truncation_and_reset(kind):
    model, ids, other = model_of(kind), ids_of(), ids_of(seed=5)
    cache = model.new_cache(2)
    in_chunks(model, cache, ids, [6, 5])
    cache.truncate(4)
    close(model(ids[:, 4:], cache=cache).logits, model(ids).logits[:, 4:])
    cache.truncate(4)
    mixed = torch.cat([ids[:, :4], other[:, 4:]], dim=1)
    close(model(other[:, 4:], cache=cache).logits, model(mixed).logits[:, 4:])
    cache.truncate(0)
    close(in_chunks(model, cache, other, [3, 8]), model(other).logits)


@by_kind
@torch.inference_mode()
def test_fork_shares_the_past_and_nothing_else(kind):
    model, ids = model_of(kind), ids_of()
    cache = model.new_cache(2, 8)
    in_chunks(model, cache, ids[:, :8], [5, 3])
    rows = [1, 0, 1]
    copy = cache.fork(rows, capacity=T)
    close(model(ids[rows, 8:], cache=copy).logits, model(ids[rows]).logits[:, 8:])
    assert (cache.length, copy.length, cache.batch, copy.batch) == (8, T, 2, 3)
    before = cache.state()
    for layer in copy.layers:
        layer[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), cache.state().values(), strict=True))


@by_kind
@torch.inference_mode()
def test_state_comes_back_from_a_file(kind, tmp_path):
    import safetensors.torch

    model, ids = model_of(kind), ids_of()
    pads = torch.zeros_like(ids, dtype=torch.bool)
    pads[0, :3] = True
    cache = model.new_cache(2)
    model(ids[:, :6], cache=cache, pad_mask=pads[:, :6])
    safetensors.torch.save_file(cache.state(), tmp_path / "cache.safetensors")
    back = Cache.from_state(model.config, safetensors.torch.load_file(tmp_path / "cache.safetensors"), capacity=T)
    here, there = model(ids[:, 6:], cache=cache).logits, model(ids[:, 6:], cache=back).logits
    assert torch.equal(here, there)


def test_a_state_of_another_model_is_refused():
    state = model_of("rope").new_cache(2).state()
    with pytest.raises(ValueError, match="layer 0 has"):
        Cache.from_state(model_of("grouped").config, state)
    with pytest.raises(ValueError, match="layer 2 has None"):
        Cache.from_state(model_of("rope").config.but(layers=3), state)
    with pytest.raises(ValueError, match="more layers"):
        Cache.from_state(model_of("rope").config.but(layers=1), state)


@torch.inference_mode()
def test_overflow_is_an_error_and_loses_nothing():
    model, ids = model_of("rope"), ids_of()
    cache = model.new_cache(2, 8)
    model(ids[:, :6], cache=cache)
    with pytest.raises(ValueError, match="need 9 places; it has 8"):
        model(ids[:, 6:9], cache=cache)
    assert cache.length == 6
    close(model(ids[:, 6:8], cache=cache).logits, model(ids).logits[:, 6:8])
    learned = model_of("learned")
    long = ids_of(length=33)
    for cache in (None, learned.new_cache(2, 40)):
        with pytest.raises(ValueError, match="position 32 is beyond the learned table of 32"):
            learned(long, cache=cache)


@torch.inference_mode()
def test_a_failed_pass_leaves_the_cache_as_it_was():
    model, ids = model_of("rope"), ids_of()
    cache = model.new_cache(2)
    model(ids[:, :6], cache=cache)
    broken = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, 6:], cache=cache)
    broken.remove()
    close(model(ids[:, 6:], cache=cache).logits, model(ids).logits[:, 6:])


def test_wrong_use_is_said_clearly():
    model, ids = model_of("rope"), ids_of()
    with pytest.raises(RuntimeError, match="inference_mode"):
        model(ids, cache=model.new_cache(2))
    with torch.inference_mode(), pytest.raises(ValueError, match="holds 3 rows, the input has 2"):
        model(ids, cache=model.new_cache(3))
    cache = model.new_cache(2)
    for wrong in (-1, 1):
        with pytest.raises(ValueError, match="truncate"):
            cache.truncate(wrong)
    with pytest.raises(ValueError, match="rows must name"):
        cache.fork([2])
    with pytest.raises(ValueError, match="at least one"):
        Cache(model.config, 0, 5)


def test_bytes_are_those_of_the_cost_model():
    for kind, batch in itertools.product(KINDS, (1, 3)):
        model = model_of(kind)
        assert model.new_cache(batch, 10).nbytes == batch * 10 * model.kv_bytes_per_token()


def test_latent_attention_caches_less_than_its_heads_would():
    latent, standard = model_of("latent"), model_of("rope")
    assert latent.kv_bytes_per_token() == 2 * 4 * (6 + 4)
    assert standard.kv_bytes_per_token() == 2 * 4 * 2 * 16
