"""The decoder: rows join, leave, draw and are forced each in their own way, and none of it shows in the others."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation.cached import Cached
from common.generation.decode import Decoder, GrowingRow, context_start
from common.generation.engine import Engine, completion_of
from common.generation.sampling import SamplingParams
from common.model.recurrent import Recurrent
from tests.generation.letters import CONTEXT, END, KINDS, RAGGED, Letters, Watched, model_of, prompts_of

MIXED = [
    SamplingParams(max_tokens=30, seed=3, logprobs=True),
    SamplingParams(temperature=0, max_tokens=5, logprobs=True),
    SamplingParams(temperature=1.7, top_k=4, max_tokens=41, seed=8),
    SamplingParams(top_p=0.8, max_tokens=17, stop=("aba",), logprobs=True),
    SamplingParams(max_tokens=30, seed=3, min_p=0.1, logprobs=True),
    SamplingParams(max_tokens=30, seed=3),  # drawn as the first is, and no numbers kept: they cannot share a group
]


def written(row):
    return row.tokens, row.raw, row.reason, row.was_forced


def run(decoder):
    ended = []
    while decoder.rows:
        ended += decoder.step()
    return ended


def alone(model, prompt, params, index, *, forced=()):
    """The same row, by itself and without a cache."""
    row = GrowingRow(prompt, params, index, forced=forced)
    decoder = Decoder(model, Letters(), {END})
    decoder.add([row])
    run(decoder)
    return row


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_at_any_time_write_what_they_write_alone(kind, cached):
    model = model_of(kind)
    prompts = [*RAGGED, *prompts_of(2, 14, 1, seed=4)]
    rows = [GrowingRow(p, MIXED[i % len(MIXED)], i) for i, p in enumerate(prompts)]
    decoder = Decoder(model, Letters(), {END}, next_logits=Cached(model) if cached else None)
    waiting, ended, step = list(rows), [], 0
    while waiting or decoder.rows:
        if step % 3 == 0:  # one or two rows join while the others run
            decoder.add(waiting[: 1 + step % 2])
            del waiting[: 1 + step % 2]
        ended += decoder.step()
        step += 1
    assert set(ended) == set(rows)
    assert len(ended) == len(rows), "each row ends once"
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        other = alone(model, prompt, row.params, i)
        assert written(row) == written(other)
        for name in ("logprobs", "sampled_logprobs"):
            assert getattr(row, name) == pytest.approx(getattr(other, name), abs=1e-4)
            assert len(getattr(row, name)) == (row.generated if row.params.logprobs else 0)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_order_of_joining_and_breaking_off(data):
    model = model_of(data.draw(st.sampled_from(["rope", "learned", "window"])))
    decoder = Decoder(model, Letters(), {END}, next_logits=Cached(model))
    rows, broken = [], set()
    for _ in range(data.draw(st.integers(3, 16))):
        for _ in range(data.draw(st.integers(0, 2))):
            (prompt,) = prompts_of(data.draw(st.integers(1, 2 * CONTEXT)), seed=len(rows))
            rows.append(GrowingRow(prompt, MIXED[data.draw(st.integers(0, len(MIXED) - 1))], len(rows)))
            decoder.add(rows[-1:])
        if decoder.rows and data.draw(st.integers(0, 9)) == 0:  # somebody hangs up
            broken.add(decoder.rows.pop(data.draw(st.integers(0, len(decoder.rows) - 1))))
        decoder.step()
    run(decoder)
    for i, row in enumerate(rows):
        other = alone(model, row.tokens[: row.prompt_tokens], row.params, i)
        if row in broken:
            assert other.tokens[: len(row.tokens)] == row.tokens
        else:
            assert written(row) == written(other)


def test_a_row_that_outgrows_the_context_is_read_again_alone():
    """Ragged rows far beyond the context: each is read when its own start moves, and nobody else is."""
    watched = Watched(model_of(context_length=32))
    prompts = prompts_of(1, 9, 20, 31, 26)
    done = Engine(watched, Letters(), ends=()).generate(prompts, SamplingParams(max_tokens=128, seed=1))
    rows = sorted(([*p, *c.ids] for p, (c,) in zip(prompts, done, strict=True)), key=lambda row: (len(row), row))
    lengths = sorted(map(len, prompts))
    read = sorted(tuple(row) for rows in watched.shown for row in rows if len(row) > 1)
    expected = [tuple(p) for p in prompts if len(p) > 1]
    for row, length in zip(rows, lengths, strict=True):
        for now in range(length + 1, length + 128):
            if context_start(now, 32) != context_start(now - 1, 32):
                expected.append(tuple(row[context_start(now, 32) : now]))
    assert read == sorted(expected)
    passes = [width for _, width in watched.shapes]
    assert passes.count(1) >= 127, "and every step goes on from the cache for the rest"


def test_params_of_its_own_for_each_prompt():
    engine = Engine(model_of(), Letters())
    prompts = [RAGGED[i % len(RAGGED)] for i in range(len(MIXED))]
    counts = [SamplingParams(**{**params.__dict__, "n": 1 + i % 3}) for i, params in enumerate(MIXED)]
    together = engine.generate(prompts, counts)
    assert [len(samples) for samples in together] == [params.n for params in counts]
    for i, (prompt, params) in enumerate(zip(prompts, counts, strict=True)):
        (single,) = engine.generate([prompt], params, indices=[i])
        assert [(c.ids, c.text, c.finish_reason) for c in single] == [
            (c.ids, c.text, c.finish_reason) for c in together[i]
        ]
        assert all((c.logprobs is not None) == params.logprobs for c in together[i])
    with pytest.raises(ValueError, match=f"{len(MIXED)} prompts need as many params, got 4"):
        engine.generate(prompts, counts[:4])


@pytest.mark.parametrize("cached", [True, False])
def test_forced_tokens_are_given_and_the_rest_is_drawn_with_its_own_numbers(cached):
    engine = Engine(model_of(), Letters(), cached=cached)
    params = SamplingParams(max_tokens=20, seed=5, n=2, logprobs=True)
    free = engine.generate(RAGGED, params)
    for count in (0, 3):  # forcing what would have been drawn changes nothing
        starts = [samples[0].ids[:count] for samples in free]
        forced = engine.generate(RAGGED, params, forced=starts)
        for (first, _), (again, _), start in zip(free, forced, starts, strict=True):
            if END not in start:
                assert again.ids == first.ids
                assert again.logprobs == pytest.approx(first.logprobs, abs=1e-5)
                assert again.forced == (
                    [True] * len(start) + [False] * (len(first.ids) - len(start)) if start else None
                )
                assert again.sampled_logprobs[: len(start)] == [0.0] * len(start)
    other = engine.generate(RAGGED, params, forced=[[4, 2]] * len(RAGGED))
    scores = engine.score(RAGGED[:2], [samples[0].ids[:4] for samples in other[:2]])
    for (one, _), score in zip(other, scores, strict=False):
        assert one.ids[:2] == [4, 2]
        assert one.logprobs[:4] == pytest.approx(score.logprobs, abs=1e-5), "also of tokens that were given"


def test_a_forced_token_ends_nothing_and_may_come_at_any_time():
    model, params = model_of(), SamplingParams(max_tokens=12, seed=2, stop=("ab",))
    row = GrowingRow([1, 2], params, forced=[END, 2, END])  # end-of-text and a stop text, both given
    decoder = Decoder(model, Letters(), {END}, next_logits=Cached(model))
    decoder.add([row])
    for expected in (END, 2, END):
        assert decoder.step() == []
        assert row.tokens[-1] == expected
    row.forced.extend([0, 1])  # "a", "b": a tool has answered
    decoder.step(), decoder.step()
    assert row.tokens[-2:] == [0, 1]
    assert row.was_forced == [True] * 5
    assert (row.reason, row.raw) == (None, b"abab")
    full = GrowingRow([1], SamplingParams(max_tokens=2), forced=[3] * 9)
    decoder.rows.clear()
    decoder.add([full])
    run(decoder)
    assert (full.reason, full.tokens) == ("length", [1, 3, 3]), "the length ends every row"
    assert list(full.forced) == [3] * 7


def test_a_stop_text_may_begin_in_forced_tokens():
    class Says(torch.nn.Module):
        vocab_size, context_length, bounded = END + 1, 4, True

        def forward(self, ids, **_):
            from common.model.output import Output

            return Output(torch.nn.functional.one_hot(torch.ones_like(ids), END + 1).float())  # always "b"

    row = GrowingRow([5], SamplingParams(temperature=0, max_tokens=5, stop=("ab",)), forced=deque([0]))
    decoder = Decoder(Says(), Letters(), {END})
    decoder.add([row])
    run(decoder)
    assert (row.reason, row.raw, row.tokens) == ("stop", b"", [5, 0, 1])


def test_ragged_prompts_without_a_cache_of_their_own():
    model = Recurrent("rnn", END + 1, 8, seed=1)
    model.context_length = CONTEXT
    decoder = Engine(model, Letters()).decoder()
    rows = [GrowingRow(p, MIXED[0], i) for i, p in enumerate(RAGGED)]
    decoder.add(rows[:3])
    decoder.step()
    decoder.add(rows[3:])
    run(decoder)
    assert [written(row) for row in rows] == [written(alone(model, p, MIXED[0], i)) for i, p in enumerate(RAGGED)]


def test_what_cannot_be_added_or_taken_is_named():
    decoder = Engine(model_of(), Letters()).decoder()
    assert decoder.step() == []
    row = GrowingRow([1], SamplingParams(max_tokens=1), index=4)
    decoder.add([row])
    with pytest.raises(ValueError, match="row 4, sample 0, is running already"):
        decoder.add([row])
    with pytest.raises(ValueError, match="has not ended"):
        completion_of(row)
    (ended,) = decoder.step()
    assert completion_of(ended).finish_reason in ("length", "end_of_text")
    with pytest.raises(ValueError, match="has ended"):
        decoder.add([row])
    with pytest.raises(ValueError, match="prompt is empty"):
        GrowingRow([], SamplingParams())


def test_an_endless_row_costs_no_more_memory_than_the_context():
    reader = Cached(model_of())
    rows = [GrowingRow(p, SamplingParams(max_tokens=60, seed=1), i) for i, p in enumerate(prompts_of(3, 9))]
    decoder = Decoder(reader.model, Letters(), (), next_logits=reader)
    decoder.add(rows)
    while decoder.rows:
        decoder.step()
        assert reader.cache.capacity <= CONTEXT
        assert reader.cache.batch == len(reader.held)
