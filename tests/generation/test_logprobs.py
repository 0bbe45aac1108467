"""One definition of a log-probability: what was generated is scored with the same numbers, whatever the shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation.engine import Engine
from common.generation.sampling import SamplingParams, probabilities
from tests.generation.letters import CONTEXT, END, KINDS, Letters, model_of, prompts_of


def padded_head(kind, rows, **changes):
    """A head with rows beyond the vocabulary, which would win often."""
    model = model_of(kind, vocab_size=END + 1 + rows, tied=False, **changes)
    with torch.no_grad():
        model.head.weight[END + 1 :] = 1.5 * model.head.weight[:1]
    return model


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    rows=st.integers(0, 60),
    lengths=st.lists(st.integers(1, CONTEXT - 1), min_size=1, max_size=5),
    cached=st.booleans(),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0, 0.5, 1.0, 2.0]),
        top_k=st.sampled_from([None, 3]),
        top_p=st.sampled_from([1.0, 0.8]),
        n=st.integers(1, 3),
        seed=st.integers(0, 100),
        max_tokens=st.just(CONTEXT),
        logprobs=st.just(True),
    ),
)
def test_generate_equals_score(kind, rows, lengths, cached, params):
    engine = Engine(padded_head(kind, rows), Letters(), cached=cached, batch_size=7)
    prompts = prompts_of(*lengths, seed=params.seed)
    made = engine.generate(prompts, params)
    fits = [
        (prompt, one.ids[: CONTEXT + 1 - len(prompt)], one.logprobs)  # beyond the context nothing is scored
        for prompt, samples in zip(prompts, made, strict=True)
        for one in samples
    ]
    scores = engine.score([prompt for prompt, _, _ in fits], [ids for _, ids, _ in fits])
    for (_, ids, logprobs), score in zip(fits, scores, strict=True):
        assert max(ids) <= END
        assert score.logprobs == pytest.approx(logprobs[: len(ids)], abs=1e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.8])
def test_sampled_logprobs_are_of_the_distribution_that_was_drawn_from(temperature):
    engine, prompts = Engine(padded_head("rope", 40), Letters()), prompts_of(1, 5, 3)
    plain = SamplingParams(temperature=temperature, max_tokens=6, seed=2, logprobs=True)
    for prompt, (one,) in zip(prompts, engine.generate(prompts, plain), strict=True):
        (score,) = engine.score([prompt], [one.ids], temperature=temperature)
        assert one.sampled_logprobs == pytest.approx(score.logprobs, abs=1e-5), "no filters: scored at that temperature"
        assert (one.sampled_logprobs == pytest.approx(one.logprobs, abs=1e-9)) == (temperature == 1)
    narrow = SamplingParams(
        temperature=temperature, top_k=4, top_p=0.9, min_p=0.02, max_tokens=6, seed=2, logprobs=True
    )
    for prompt, (one,) in zip(prompts, engine.generate(prompts, narrow), strict=True):
        tokens = list(prompt)
        for token, sampled in zip(one.ids, one.sampled_logprobs, strict=True):
            with torch.no_grad():
                logits = engine.model(torch.tensor([tokens])).logits[:, -1, : END + 1]
            assert sampled == pytest.approx(float(probabilities(logits, narrow)[0, token].log()), abs=1e-5)
            tokens.append(token)


def test_a_flat_head_shows_what_dead_rows_would_take():
    """257 tokens on 320 rows would be off by ln(320 / 257); here 12 on 48."""
    model = model_of(vocab_size=48, tied=False)
    with torch.no_grad():
        model.head.weight.zero_()
    engine = Engine(model, Letters())
    ((one,),) = engine.generate([[1]], SamplingParams(max_tokens=3, logprobs=True))
    expected = [-float(torch.tensor(12.0).log())] * len(one.ids)
    assert one.logprobs == pytest.approx(expected, abs=1e-6)
    assert engine.score([[1]], [one.ids])[0].logprobs == pytest.approx(expected, abs=1e-6)


def test_logprobs_come_only_if_asked_for():
    ((one,),) = Engine(model_of(), Letters()).generate([[1]], SamplingParams(max_tokens=3))
    assert (one.logprobs, one.sampled_logprobs, one.forced) == (None, None, None)


def test_what_has_no_score_is_named():
    engine = Engine(padded_head("rope", 40), Letters())
    with pytest.raises(ValueError, match="scores need a temperature above 0"):
        engine.score([[1]], [[2]], temperature=0)
    with pytest.raises(ValueError, match="continuation 1 has ids from 3 to 12, outside the 12 tokens"):
        engine.score([[1], [1]], [[2], [3, 12]])
    assert engine.score([[1]], [[]])[0].logprobs == []
