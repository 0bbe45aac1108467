"""Rows of several caches in one: they go on as if they had always been together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation.decode import padded
from common.model.cache import Cache
from tests.generation.letters import END, KINDS, model_of, prompts_of


def read(model, rows):
    ids, pads = padded(rows, left=True, device="cpu")
    cache = model.new_cache(len(rows), ids.shape[1])
    model(ids, cache=cache, pad_mask=pads if pads.any() else None)
    return cache


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
def test_gathered_rows_go_on_as_they_would_alone(kind, lengths, data):
    model = model_of(kind)
    with torch.no_grad():
        texts = [prompts_of(*group, seed=i) for i, group in enumerate(lengths)]
        caches = [read(model, rows) for rows in texts]
        chosen = [data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=4)) for rows in texts]
        if not any(chosen):
            chosen[0] = [0]
        made = Cache.gather(list(zip(caches, chosen, strict=True)), capacity=12)
        rows = [texts[i][row] for i, group in enumerate(chosen) for row in group]
        assert made.length == max(map(len, rows)), "no padding that all rows have"
        assert (made.batch, made.capacity) == (len(rows), 12)
        assert made.has_pads == (len({len(row) for row in rows}) > 1)
        more = torch.randint(END, (len(rows), 2), generator=torch.Generator().manual_seed(7))
        found = model(more, cache=made).logits
        for row, new, logits in zip(rows, more, found, strict=True):
            expected = model(torch.tensor([[*row, *new.tolist()]])).logits[0, -2:]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        before = [cache.layers[0][0].clone() for cache in caches]
        made.layers[0][0].fill_(9.0)
        assert all(torch.equal(a, c.layers[0][0]) for a, c in zip(before, caches, strict=True)), "a copy of its own"


def test_documents_come_along():
    model = model_of()
    with torch.no_grad():
        cache = model.new_cache(2, 4)
        documents = torch.tensor([[1, 1, 2], [5, 6, 6]])
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache=cache, document_ids=documents)
        plain = read(model, [[1, 2]])
        made = Cache.gather([(cache, [1]), (plain, [0])], capacity=6)
        assert made.has_documents
        found = model(torch.tensor([[7], [8]]), cache=made).logits[:, -1]
        torch.testing.assert_close(found[0], model(torch.tensor([[5, 6, 7]])).logits[0, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], model(torch.tensor([[1, 2, 8]])).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_gathered_is_named():
    model, other = model_of(), model_of("learned")
    with torch.no_grad():
        cache, theirs = read(model, [[1, 2, 3]]), read(other, [[1]])
    with pytest.raises(ValueError, match="no rows to gather"):
        Cache.gather([(cache, [])])
    with pytest.raises(ValueError, match="different models"):
        Cache.gather([(cache, [0]), (theirs, [0])])
    with pytest.raises(ValueError, match="rows must name some of 0 to 0"):
        Cache.gather([(cache, [1])])
    with pytest.raises(ValueError, match="3 tokens do not fit into a capacity of 2"):
        Cache.gather([(cache, [0])], capacity=2)
