"""The sampler's contract: limits, filters against transformers, frequencies against chi-square."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.generation.sampling import SamplingParams, probabilities, sample, uniform_numbers


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.one_of(st.none(), st.integers(1, 40)),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)
def test_filters_equal_transformers(seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    if min_p > 0:
        warped = MinPLogitsWarper(min_p)(None, warped)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(probabilities(logits, params), warped.softmax(dim=1), atol=1e-9, rtol=1e-7)


def test_greedy_is_the_first_maximum_exactly():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    params = SamplingParams(temperature=0, logprobs=True)
    ids, logprobs = sample(logits, params, torch.tensor([0.999]))
    assert (ids.item(), logprobs.item()) == (1, 0.0), "greedy is certain"
    assert probabilities(logits, params).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_small_temperature_approaches_greedy_and_one_is_the_model():
    logits = torch.randn(5, 20)
    cold = probabilities(logits, SamplingParams(temperature=1e-3))
    torch.testing.assert_close(cold, probabilities(logits, SamplingParams(temperature=0)), atol=1e-3, rtol=0)
    torch.testing.assert_close(probabilities(logits, SamplingParams()), logits.double().softmax(dim=1))


def test_top_k_keeps_exactly_k_also_on_ties():
    p = probabilities(torch.zeros(1, 10), SamplingParams(top_k=3))
    assert p.tolist()[0] == pytest.approx([1 / 3] * 3 + [0] * 7)


def test_frequencies_match_the_distribution():
    params = SamplingParams(temperature=0.7, top_p=0.9, logprobs=True)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    p = probabilities(logits, params)[0].numpy()
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000))
    ids, logprobs = sample(logits.expand(20_000, -1), params, uniforms)
    counts = np.bincount(ids, minlength=12)
    assert logprobs.exp().numpy() == pytest.approx(p[ids], abs=1e-12), "the probability that it was drawn with"
    assert counts[p == 0].sum() == 0, "a filtered token is never drawn"
    assert stats.chisquare(counts[p > 0], 20_000 * p[p > 0]).pvalue > 0.001


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53, 1.0])
def test_the_ends_of_the_interval_stay_inside_the_support(number):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    ids, logprobs = sample(logits, SamplingParams(logprobs=True), torch.tensor([number]))
    assert ids.item() in (1, 3)
    assert logprobs.exp().item() == pytest.approx(0.5)


def test_numbers_belong_to_seed_prompt_and_sample():
    first = uniform_numbers(1, 2, 3, 50)
    assert np.array_equal(first[:20], uniform_numbers(1, 2, 3, 20)), "a longer draw begins with the shorter one"
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)):
        assert not np.array_equal(first, uniform_numbers(*other, 50))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.0},
        {"max_tokens": 0},
        {"stop": "\n"},
        {"stop": ("",)},
        {"n": 0},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_named(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"SamplingParams.{name}"):
        SamplingParams(**fields)
