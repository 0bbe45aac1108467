"""The engine's promises: samples do not depend on neighbours, scores equal what was sampled, stops are exact."""

import json

import pytest
import torch

from common.data.problems import addition_problems
from common.generation import decode
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.config import ModelConfig
from common.model.ngram import NGram
from common.model.output import Output
from common.model.transformer import Transformer
from common.tokenization.byte import ByteTokenizer
from common.tokenization.chat import CHATML, encode_chat
from common.tokenization.protocol import END_OF_TEXT, SPECIALS
from tests.generation.letters import Letters, Watched, model_of, prompts_of


def small_model(seed=1, context_length=64):
    config = ModelConfig(vocab_size=260, context_length=context_length, layers=1, width=16, heads=2)
    return Transformer(config, seed=seed).eval()


WARM = SamplingParams(temperature=1.3, max_tokens=12, n=3, seed=5, logprobs=True)


def test_a_sample_depends_on_seed_prompt_and_number_only(adder):
    prompts = [adder.encode(text) for text in ("1+1=", "", "9+", "3+4=5", "7")]
    whole = adder.generate(prompts, WARM)
    for i, prompt in enumerate(prompts):
        (alone,) = adder.generate([prompt], WARM, indices=[i])
        assert [c.ids for c in alone] == [c.ids for c in whole[i]]
    small = Engine(adder.model, adder.tokenizer, batch_size=2).generate(prompts, WARM)
    assert [[c.ids for c in row] for row in small] == [[c.ids for c in row] for row in whole]
    fewer = adder.generate(prompts, SamplingParams(**{**WARM.__dict__, "n": 1}))
    assert [row[0].ids for row in fewer] == [row[0].ids for row in whole]
    assert len({tuple(c.ids) for c in whole[1]}) == 3, "samples of one prompt are different draws"
    assert [c.ids for c in whole[0]] != [c.ids for c in adder.generate(prompts, SamplingParams(max_tokens=12, n=3))[0]]


def test_scores_equal_the_logprobs_of_sampling(adder):
    prompts = [adder.encode(text) for text in ("1+1=", "", "9+9=1")]
    flat = [(p, c) for p, row in zip(prompts, adder.generate(prompts, WARM), strict=True) for c in row]
    scores = adder.score([p for p, _ in flat], [c.ids for _, c in flat])
    for (_, completion), score in zip(flat, scores, strict=True):
        assert score.logprobs == pytest.approx(completion.logprobs, abs=1e-5)
        assert score.sum == pytest.approx(sum(completion.logprobs), abs=1e-4)


def test_scoring_does_not_depend_on_the_batch(adder):
    prompts, continuations = [adder.encode("1+2=")] * 2, [[51], list(b"3 and much more")]
    together = adder.score(prompts, continuations)
    alone = adder.score(prompts[:1], continuations[:1])
    assert together[0].logprobs == pytest.approx(alone[0].logprobs, abs=1e-6)
    assert len(together[1].logprobs) == 15


def test_a_batch_of_scores_is_bounded_in_rows_and_in_logits(adder, monkeypatch):
    prompts = [adder.encode("1+2=" * (i % 7)) for i in range(40)]
    continuations = [[51] * (i % 3) for i in range(40)]
    whole = adder.score(prompts, continuations)
    watched = Watched(adder.model)
    engine = Engine(watched, adder.tokenizer, batch_size=9)
    engine.score(prompts, continuations)
    assert max(rows for rows, _ in watched.shapes) == 9
    watched.shapes.clear()
    monkeypatch.setattr(decode, "LOGITS_AT_ONCE", 60 * 257)
    bounded = engine.score(prompts, continuations)
    assert max(rows * width for rows, width in watched.shapes) <= 60
    assert sum(rows for rows, _ in watched.shapes) == sum(len(c) > 0 for c in continuations)
    assert len(watched.shapes) < 20, "as many rows as fit"
    monkeypatch.setattr(decode, "LOGITS_AT_ONCE", 1)
    alone = engine.score(prompts, continuations)  # a row that is too large runs alone
    for one, two, three in zip(whole, bounded, alone, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-6)
        assert one.logprobs == pytest.approx(three.logprobs, abs=1e-6)


def test_scores_of_a_transformer():
    engine = Engine(model_of(), Letters(), batch_size=3)
    prompts, params = prompts_of(1, 5, 3, 7, 2), SamplingParams(max_tokens=5, n=2, logprobs=True)
    flat = [(p, c) for p, row in zip(prompts, engine.generate(prompts, params), strict=True) for c in row]
    for (_, completion), score in zip(
        flat, engine.score(*zip(*[(p, c.ids) for p, c in flat], strict=True)), strict=True
    ):
        assert score.logprobs == pytest.approx(completion.logprobs, abs=1e-4)


def test_a_row_beyond_the_context_is_refused():
    engine = Engine(model_of(), Letters())
    assert len(engine.score([[1] * 10], [[2] * 3])[0].logprobs) == 3  # twelve are shown, the last is only scored
    with pytest.raises(ValueError, match="prompt 1 and its continuation show the model 13 tokens > context_length 12"):
        engine.score([[1], [1] * 10], [[2], [2] * 4])


def test_greedy_answers_what_it_learned(adder):
    problems = addition_problems(1, "train")
    rows = adder.generate([adder.encode(problem.question) for problem in problems], SamplingParams(temperature=0))
    assert [row[0].text for row in rows] == [problem.answer for problem in problems]
    assert all(row[0].finish_reason == "end_of_text" for row in rows)
    assert rows[-1][0].ids == [*problems[-1].answer.encode(), adder.end]
    assert rows[-1][0].prompt_tokens == 5


class Chant:
    """Says the same text over and over, whatever it is given."""

    vocab_size, context_length = 257, 64

    def __init__(self, text):
        self.text = text.encode()

    def __call__(self, ids, *, document_ids=None, pad_mask=None):
        logits = torch.full((*ids.shape, 257), -torch.inf)
        for row in range(len(ids)):
            said = int((~pad_mask[row]).sum()) - 1
            logits[row, -1, self.text[said % len(self.text)]] = 0.0
        return Output(logits)


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ((), "to be or n", "length"),
        (("or",), "to be ", "stop"),
        (("be o", "be"), "to ", "stop"),
        (("x",), "to be or n", "length"),
    ],
)
def test_stop_texts(tokenizer, stop, text, reason):
    engine = Engine(Chant("to be or not "), tokenizer)
    ((done,),) = engine.generate([[256]], SamplingParams(temperature=0, max_tokens=10, stop=stop))
    assert (done.text, done.finish_reason) == (text, reason)


def test_a_stop_text_in_the_prompt_does_not_end_the_answer(tokenizer):
    engine = Engine(Chant("abcd"), tokenizer)
    ((done,),) = engine.generate([engine.encode("d")], SamplingParams(temperature=0, max_tokens=3, stop=("da", "d")))
    assert done.text == "bc"
    assert done.finish_reason == "stop"


def test_half_a_character_is_not_lost_or_raised(tokenizer):
    engine = Engine(Chant("é"), tokenizer)
    ((done,),) = engine.generate([[256]], SamplingParams(temperature=0, max_tokens=3))
    assert done.text == "é\ufffd"


def test_bad_input_is_named(adder, tokenizer):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        adder.generate([[1], []], SamplingParams())
    with pytest.raises(ValueError, match="2 prompts need as many indices, got 1"):
        adder.generate([[1], [2]], SamplingParams(), indices=[0])
    with pytest.raises(ValueError, match="1 prompts and 2 continuations"):
        adder.score([[1]], [[1], [2]])
    small = NGram.fit([torch.tensor([0, 1])], 1, 2)
    with pytest.raises(ValueError, match="do not belong together"):
        Engine(small, tokenizer)


def test_no_prompts_no_completions(adder):
    assert adder.generate([], SamplingParams()) == []
    assert adder.score([], []) == []


def test_the_earliest_stop_text_wins_whatever_their_order(tokenizer):
    class TwoBytes(ByteTokenizer):
        def token_bytes(self, token_id):
            return b"ab cd"

    for stops in (("d", "b"), ("b", "d")):
        ((done,),) = Engine(Chant("x"), TwoBytes()).generate([[256]], SamplingParams(temperature=0, stop=stops))
        assert done.text == "a"


def test_how_a_prompt_begins_is_decided_by_the_engine():
    words, model = ByteTokenizer(SPECIALS), small_model()
    end, messages = words.specials[END_OF_TEXT], [{"role": "user", "content": "Hi<|im_end|>"}]
    engine = Engine(model, words, template=CHATML)
    assert engine.encode("Hi") == [end, *b"Hi"]
    assert engine.encode("") == [end]
    assert engine.encode(messages) == encode_chat(messages, CHATML, words).ids, "a template says itself how it begins"
    assert Engine(model, words, opening=()).encode("Hi") == list(b"Hi")
    assert Engine(model, words, opening=[7, 8]).encode("Hi") == [7, 8, *b"Hi"]
    with pytest.raises(ValueError, match="no chat template"):
        Engine(model, words).encode(messages)


def test_every_call_takes_texts_conversations_and_ids():
    words, greedy = ByteTokenizer(SPECIALS), SamplingParams(temperature=0, max_tokens=5)
    engine = Engine(small_model(), words, template=CHATML)
    prompts = ["Hi", [{"role": "user", "content": "Who?"}], [5, 6]]
    ids = [engine.encode(prompts[0]), engine.encode(prompts[1]), [5, 6]]
    written = lambda made: [one.ids for (one,) in made]  # noqa: E731
    assert written(engine.generate(prompts, greedy)) == written(engine.generate(ids, greedy))
    assert engine.score(prompts, [[1, 2]] * 3) == engine.score(ids, [[1, 2]] * 3)
    for prompt, same in zip(prompts, ids, strict=True):
        assert list(engine.stream(prompt, greedy)) == list(engine.stream(same, greedy))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate(["", []], greedy)


def test_an_identity_changes_with_whatever_changes_the_answers():
    words, model = ByteTokenizer(SPECIALS), small_model()
    engine = Engine(model, words, template=CHATML)
    same = Engine(small_model(), ByteTokenizer(SPECIALS), template=CHATML, batch_size=3, cached=False)
    assert json.loads(json.dumps(engine.identity())) == engine.identity() == same.identity()
    others = {
        "model": Engine(small_model(seed=2), words, template=CHATML),
        "context_length": Engine(small_model(context_length=32), words, template=CHATML),
        "tokenizer": Engine(small_model(), ByteTokenizer([*SPECIALS[:3], "<other>"]), template=CHATML),
        "template": Engine(model, words, template=CHATML + " "),
        "opening": Engine(model, words, template=CHATML, opening=()),
        "ends": Engine(model, words, template=CHATML, ends=[1, 2]),
    }
    for name, other in others.items():
        found = other.identity()
        assert {key for key in found if found[key] != engine.identity()[key]} == {name}
