"""Cached equals uncached, for every kind of model and every way in which rows can differ; and the cache does save work."""

import itertools

import pytest
import torch

from common.generation import decode
from common.generation.decode import context_start, padded
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.cache import Cache
from common.model.recurrent import Recurrent
from tests.generation.letters import CONTEXT, END, KINDS, RAGGED, Letters, Watched, model_of, prompts_of

SETTINGS = {
    "sampled": SamplingParams(n=2, max_tokens=25, seed=3, logprobs=True),
    "greedy": SamplingParams(temperature=0, max_tokens=25, logprobs=True),
    "stops": SamplingParams(temperature=1.5, n=3, max_tokens=20, seed=1, stop=("aba", "b b", "€"), logprobs=True),
    "short": SamplingParams(n=2, max_tokens=1, seed=4, logprobs=True),
    "filtered": SamplingParams(n=2, max_tokens=15, top_k=5, top_p=0.9, min_p=0.05, seed=2, logprobs=True),
}


def flat(completions):
    return [completion for row in completions for completion in row]


def assert_same(here, there):
    assert [(c.ids, c.text, c.finish_reason) for c in flat(here)] == [
        (c.ids, c.text, c.finish_reason) for c in flat(there)
    ]
    for a, b in zip(flat(here), flat(there), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached(kind, setting):
    model, params = model_of(kind), SETTINGS[setting]
    slow = Engine(model, Letters(), cached=False).generate(RAGGED, params)
    for batch_size in (256, 3):
        fast = Engine(model, Letters(), batch_size=batch_size).generate(RAGGED, params)
        assert_same(fast, slow)
    if setting == "sampled":
        assert len({len(c.ids) for c in flat(fast)}) > 4, "rows end at different times"
        assert max(len(c.ids) for c in flat(fast)) > CONTEXT, "some of them beyond the context"


def test_the_uncached_path_is_the_model_row_by_row():
    """What `recompute` does for a batch, said without padding and without a batch."""
    model = model_of("learned")
    (done,) = Engine(model, Letters(), cached=False).generate([RAGGED[1]], SETTINGS["greedy"])
    tokens = list(RAGGED[1])
    with torch.inference_mode():
        for token, logprob in zip(done[0].ids, done[0].logprobs, strict=True):
            logits = model(torch.tensor([tokens[context_start(len(tokens), CONTEXT) :]])).logits[0, -1]
            assert token == int(logits.argmax())
            assert logprob == pytest.approx(float(logits.log_softmax(dim=0)[token]), abs=1e-5)
            tokens.append(token)


@pytest.mark.parametrize("context_length", [1, 2, 3, 7, 8, 50])
def test_the_rule_of_the_context(context_length):
    stride = max(1, context_length // 2)
    for length in range(1, 5 * context_length + 3):
        start = context_start(length, context_length)
        if length <= context_length:
            assert start == 0
        assert start % stride == 0
        assert 1 <= length - start <= context_length
        assert start == 0 or length - (start - stride) > context_length, "the smallest that fits"


@pytest.mark.parametrize("cached", [True, False])
def test_never_more_than_the_context_and_exactly_the_rule(cached):
    watched = Watched(model_of())
    params = SamplingParams(temperature=0, max_tokens=40)
    engine = Engine(watched, Letters(), cached=cached)
    engine.end = -1  # so that no row ends early
    ((done,),) = engine.generate([RAGGED[0]], params)
    assert max(width for _, width in watched.shapes) <= CONTEXT
    if cached:  # the prompt, then again each time the start has moved
        moves = [
            length for length in range(2, 41) if context_start(length, CONTEXT) != context_start(length - 1, CONTEXT)
        ]
        assert [width for _, width in watched.shapes if width > 1] == [CONTEXT - CONTEXT // 2 + 1] * len(moves)
    else:
        tokens = [*RAGGED[0], *done.ids]
        for step, (shown,) in enumerate(watched.shown):
            assert shown == tokens[context_start(step + 1, CONTEXT) : step + 1]


def test_a_bounded_model_sees_exactly_its_last_tokens(adder):
    watched = Watched(adder.model)
    Engine(watched, adder.tokenizer).generate([adder.encode("1+1=2 and 3")], SamplingParams(max_tokens=2, seed=1))
    assert watched.shown[0] == [list(b"and 3")]
    assert all(width == adder.model.context_length for _, width in watched.shapes)


def test_a_recurrent_network_has_no_cache_and_the_same_promises():
    model = Recurrent("lstm", END + 1, 8, seed=1)
    model.context_length = CONTEXT
    watched, params = Watched(model), SETTINGS["sampled"]
    whole = Engine(watched, Letters()).generate(RAGGED, params)
    assert max(width for _, width in watched.shapes) <= CONTEXT
    assert_same(whole, Engine(model, Letters(), batch_size=2).generate(RAGGED, params))


@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_a_sample_does_not_depend_on_its_neighbours(kind):
    model, params = model_of(kind), SETTINGS["sampled"]
    whole = Engine(model, Letters()).generate(RAGGED, params)
    for batch_size in (1, 4, 5):
        assert_same(whole, Engine(model, Letters(), batch_size=batch_size).generate(RAGGED, params))
    for i, prompt in enumerate(RAGGED):
        assert_same([whole[i]], Engine(model, Letters()).generate([prompt], params, indices=[i]))
    others = [*prompts_of(30, 2, seed=7), *RAGGED[::-1]]
    indices = [90, 91, *range(len(RAGGED))[::-1]]
    assert_same(whole, Engine(model, Letters()).generate(others, params, indices=indices)[2:][::-1])


def test_each_distinct_prompt_is_read_once():
    watched = Watched(model_of())
    prompts = [RAGGED[1], RAGGED[3], RAGGED[1], RAGGED[6]]
    Engine(watched, Letters()).generate(prompts, SamplingParams(n=5, max_tokens=3, seed=1))
    assert watched.shapes[0] == (3, 9), "20 rows, three prompts"
    assert all(width == 1 for _, width in watched.shapes[1:])
    watched.shapes.clear()
    prompts = [RAGGED[1], RAGGED[5], RAGGED[1], RAGGED[5]]
    Engine(watched, Letters(), batch_size=10).generate(prompts, SamplingParams(n=5, max_tokens=1, seed=1))
    assert watched.shapes == [(1, 5), (1, 5)], "equal prompts share a batch"


def test_finished_rows_leave_the_cache_when_that_pays(monkeypatch):
    forks = []
    fork = Cache.fork
    monkeypatch.setattr(Cache, "fork", lambda self, *a, **k: forks.append(self.batch) or fork(self, *a, **k))
    watched = Watched(model_of(context_length=64))
    done = Engine(watched, Letters()).generate(prompts_of(*[4] * 16), SamplingParams(max_tokens=40, seed=6))
    lengths = sorted(len(row[0].ids) for row in done)
    for step, (rows, _) in enumerate(watched.shapes):
        going = sum(length > step for length in lengths)
        assert going <= rows, "every unfinished row is shown"
        assert step == 0 or 4 * (rows - going) < rows, "fewer than a quarter of the rows are finished ones"
    rows = [rows for rows, _ in watched.shapes]
    assert all(after == before or 4 * after <= 3 * before for before, after in itertools.pairwise(rows))
    assert len(set(rows)) == len(forks) >= 4, "one copy of the prefill, and one for each time that rows left"


def test_logits_of_a_prefill_are_bounded(monkeypatch):
    params, prompts = SETTINGS["sampled"], [*RAGGED, *prompts_of(10, 11)]
    whole = Engine(model_of(), Letters()).generate(prompts, params)
    monkeypatch.setattr(decode, "LOGITS_AT_ONCE", 40 * (END + 1))
    for cached in (True, False):
        watched = Watched(model_of())
        assert_same(whole, Engine(watched, Letters(), cached=cached).generate(prompts, params))
        assert max(rows * width for rows, width in watched.shapes) <= 40


def test_what_is_made_while_sampling_serves_training_too():
    model = model_of()
    Engine(model, Letters()).generate([[1, 2]], SamplingParams(max_tokens=3))
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_rows_are_filled_up_on_either_side():
    ids, pads = padded([[5], [6, 7, 8]], left=True, device="cpu")
    assert (ids.tolist(), pads.int().tolist()) == ([[0, 0, 5], [6, 7, 8]], [[1, 1, 0], [0, 0, 0]])
    ids, pads = padded([[5], [6, 7, 8]], left=False, device="cpu")
    assert (ids.tolist(), pads.int().tolist()) == ([[5, 0, 0], [6, 7, 8]], [[0, 1, 1], [0, 0, 0]])
