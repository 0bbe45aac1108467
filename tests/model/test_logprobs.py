"""Log-probabilities of tokens, against torch over the cut vocabulary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.model.logprobs import token_logprobs


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    vocab=st.integers(1, 9),
    rows=st.integers(0, 20),
    temperature=st.floats(0.1, 5.0),
)
def test_dead_rows_take_no_probability(seed, shape, vocab, rows, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(*shape, vocab + rows, generator=generator)
    ids = torch.randint(vocab, shape, generator=generator)
    found = token_logprobs(logits, ids, vocab_size=vocab, temperature=temperature)
    assert (found.shape, found.dtype) == (ids.shape, torch.float64)
    every = torch.log_softmax(logits[..., :vocab].double() / temperature, -1)
    assert torch.equal(found, every.gather(-1, ids[..., None]).squeeze(-1))
    total = sum(token_logprobs(logits, torch.full(shape, i), vocab_size=vocab).exp() for i in range(vocab))
    torch.testing.assert_close(total, torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_without_probabilities_is_named(temperature):
    with pytest.raises(ValueError, match="needs a temperature above 0"):
        token_logprobs(torch.zeros(1, 3), torch.tensor([1]), vocab_size=3, temperature=temperature)


def test_a_row_that_is_no_token_has_no_log_probability():
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_logprobs(torch.zeros(1, 5), torch.tensor([3]), vocab_size=3)
