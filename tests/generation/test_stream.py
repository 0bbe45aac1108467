"""Pieces of a stream: together the text of `generate`, and none of them taken back or kept waiting without need."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation.engine import Engine, undecided
from common.generation.sampling import SamplingParams
from common.model.output import Output
from common.tokenization.byte import ByteTokenizer
from tests.generation.letters import END, PIECES, RAGGED, Letters, Watched, model_of


class Dice:
    """Any token, whatever came before: the worst that text can do."""

    context_length = 1

    def __init__(self, logits):
        self.logits, self.vocab_size = logits, len(logits)

    def __call__(self, ids, *, document_ids=None, pad_mask=None):
        return Output(self.logits.expand(*ids.shape, -1))


class Script:
    """Says this text, byte by byte, and ends."""

    vocab_size, context_length = 257, 64

    def __init__(self, text):
        self.bytes = [*text, 256]

    def __call__(self, ids, *, document_ids=None, pad_mask=None):
        logits = torch.zeros(len(ids), ids.shape[1], 257)
        logits[0, -1, self.bytes[int((~pad_mask).sum()) - 1]] = 1.0
        return Output(logits)


stops_of = st.lists(st.text("ab €é\ufffd", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 10**6), stop=stops_of, end=st.floats(-9, 0), max_tokens=st.integers(1, 30))
def test_pieces_are_the_text_of_generate(seed, stop, end, max_tokens):
    engine = Engine(Dice(torch.tensor([0.0] * END + [end])), Letters())
    params = SamplingParams(stop=stop, seed=seed, max_tokens=max_tokens)
    pieces = list(engine.stream([END], params))
    assert "".join(pieces) == engine.generate([[END]], params)[0][0].text
    assert all(pieces)


@settings(max_examples=100, deadline=None)
@given(text=st.binary(max_size=12), stop=st.lists(st.text(min_size=1, max_size=2), max_size=2).map(tuple))
def test_any_bytes(text, stop):
    engine = Engine(Script(text), ByteTokenizer())
    params = SamplingParams(temperature=0, stop=stop, max_tokens=20)
    whole = engine.generate([[256]], params)[0][0].text
    assert "".join(engine.stream([256], params)) == whole
    if not any(one in text.decode("utf-8", errors="replace") for one in stop):
        assert whole == text.decode("utf-8", errors="replace")


@settings(max_examples=300, deadline=None)
@given(raw=st.lists(st.sampled_from(PIECES), max_size=6).map(b"".join), stop=stops_of, more=st.binary(max_size=4))
def test_what_is_not_held_back_is_never_taken_back(raw, stop, more):
    stops = [text.encode() for text in stop]
    if any(text in raw for text in stops):
        return
    certain = len(raw) - undecided(raw, stops)
    found = [at for text in stops if (at := (raw + more).find(text)) >= 0]
    assert min(found, default=certain) >= certain


def pieces_of(text, **fields):
    params = SamplingParams(temperature=0, max_tokens=20, **fields)
    return list(Engine(Script(text.encode()), ByteTokenizer()).stream([256], params))


def test_pieces_come_as_soon_as_they_are_certain():
    assert pieces_of("to be") == ["t", "o", " ", "b", "e"]
    assert pieces_of("né €") == ["n", "é", " ", "€"], "a character is one piece"
    assert pieces_of("to be or not", stop=("be not", "or")) == ["t", "o ", "be "], "an o may begin or"
    assert pieces_of("aab", stop=("ab",)) == ["a"]
    assert pieces_of("aaa", stop=("aab",)) == ["a", "aa"], "the end decides what was held back"


@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_a_transformer_streams_what_it_generates(kind):
    engine = Engine(model_of(kind), Letters())
    params = SamplingParams(stop=("aba", "€"), seed=2, max_tokens=30)
    completions = engine.generate(RAGGED, params)
    for i, (prompt, (whole,)) in enumerate(zip(RAGGED, completions, strict=True)):
        assert "".join(engine.stream(prompt, params, index=i)) == whole.text


def test_a_stream_runs_only_as_far_as_it_is_read():
    model = Watched(Script(b"abcdef"))
    stream = Engine(model, ByteTokenizer()).stream([256], SamplingParams(temperature=0))
    assert not model.shapes
    assert next(stream) + next(stream) == "ab"
    assert len(model.shapes) == 2
    assert not torch.is_inference_mode_enabled(), "the reader's own work is not in inference mode"
    stream.close()
    assert not torch.is_inference_mode_enabled()


def test_bad_input_is_named_before_the_first_piece():
    engine = Engine(Script(b""), ByteTokenizer())
    with pytest.raises(ValueError, match="one completion, and n is 2"):
        engine.stream([256], SamplingParams(n=2))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.stream([], SamplingParams())
