"""Conversations: the same replies with and without memory, turns that end, and what an interruption leaves behind."""

import itertools

import pytest
import torch

from common.generation.conversation import Conversation, chat_engine
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.tokenization.byte import ByteTokenizer
from common.tokenization.chat import CHATML, encode_chat
from common.tokenization.protocol import SPECIALS

WORDS = ByteTokenizer(SPECIALS)
TURNS = ("Who is there?", "Long live the king!", "Barnardo?")


def model(context=512, **more):
    config = ModelConfig(vocab_size=WORDS.vocab_size, context_length=context, layers=2, width=32, heads=2, **more)
    return Transformer(config, seed=3).eval()


def talk(engine, template=CHATML, tokens=12):
    engine.template = template
    conversation = Conversation(engine)
    params = SamplingParams(temperature=1.0, max_tokens=tokens, seed=5)
    return ["".join(conversation.reply(text, params)) for text in TURNS], conversation


def without_memory(network):
    engine = chat_engine(network, WORDS)
    engine.prefix = None
    return engine


@pytest.mark.parametrize("context", [512, 96])  # 96: the conversation outgrows what is kept
def test_replies_do_not_depend_on_memory(context):
    network = model(context)
    try:
        expected = talk(without_memory(network))[0]
    except ValueError:
        with pytest.raises(ValueError, match="context"):
            talk(chat_engine(network, WORDS))
        return
    assert talk(chat_engine(network, WORDS))[0] == expected


def test_a_turn_reads_only_what_is_new():
    network, read = model(), []
    network.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    engine = Engine(network, WORDS, remember=True)
    first = encode_chat([{"role": "user", "content": "Who is there?"}], CHATML, WORDS).ids
    params = SamplingParams(temperature=0, max_tokens=4)
    list(engine.stream(first, params))
    assert read[0] == len(first)
    said = engine.prefix.tokens
    read.clear()
    list(engine.stream([*said, *WORDS.encode("Long")], params))
    assert read[0] == len("Long")
    read.clear()
    list(engine.stream([*said[:5], *WORDS.encode("else")], params))  # another conversation with the same beginning
    assert read[0] == len("else")
    read.clear()
    list(engine.stream(WORDS.encode("else"), params))
    assert read[0] == len("else")


def test_a_prompt_that_is_remembered_whole_is_still_answered():
    network = model()
    engine, plain = Engine(network, WORDS, remember=True), Engine(network, WORDS)
    params = SamplingParams(temperature=0, max_tokens=6)
    prompt = WORDS.encode("Barnardo?")
    expected = list(plain.stream(prompt, params))
    for _ in range(3):
        assert list(engine.stream(prompt, params)) == expected


class Scripted(torch.nn.Module):
    """Says a fixed sequence of ids, whatever it is asked."""

    def __init__(self, ids):
        super().__init__()
        self.ids, self.said, self.vocab_size, self.context_length, self.bounded = ids, 0, WORDS.vocab_size, 256, True

    def forward(self, ids, **_):
        from common.model.output import Output

        logits = torch.zeros(*ids.shape, self.vocab_size)
        logits[:, -1, self.ids[self.said]] = 9.0
        self.said += 1
        return Output(logits)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_a_turn_ends_where_the_model_ends_it(end):
    script = [*WORDS.encode("Nay."), WORDS.specials[end], *WORDS.encode("never said")]
    conversation = Conversation(chat_engine(Scripted(script), WORDS, CHATML))
    assert "".join(conversation.reply("Who?", SamplingParams(temperature=0, max_tokens=20))) == "Nay."
    assert conversation.messages == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nay."}]


def test_a_reply_that_is_broken_off_is_kept_as_far_as_it_came():
    conversation = Conversation(chat_engine(Scripted(WORDS.encode("answer me")), WORDS, CHATML))
    pieces = conversation.reply("Who?", SamplingParams(temperature=0, max_tokens=9))
    got = "".join(itertools.islice(pieces, 6))
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": got}
    assert got == "answer"


def test_what_does_not_fit_is_refused_and_not_kept():
    conversation = Conversation(chat_engine(model(context=40), WORDS, CHATML))
    with pytest.raises(ValueError, match="begin a new one"):
        list(conversation.reply("x" * 100, SamplingParams(max_tokens=2)))
    assert conversation.messages == []


def test_a_model_without_a_template_continues_the_text():
    network = model()
    conversation = Conversation(chat_engine(network, WORDS))
    engine = Engine(network, WORDS)
    params = SamplingParams(temperature=0, max_tokens=8)
    assert "".join(conversation.reply("To be", params)) == "".join(engine.stream(engine.encode("To be"), params))


def test_rows_that_are_no_tokens_are_never_drawn():
    wide = Transformer(ModelConfig(vocab_size=WORDS.vocab_size + 60, context_length=64, layers=1, width=16, heads=2))
    with torch.no_grad():
        wide.head.weight[WORDS.vocab_size :] = 3 * wide.head.weight[:60]
    engine = Engine(wide, WORDS)
    made = engine.generate([WORDS.encode("a")], SamplingParams(temperature=5.0, max_tokens=40, n=4, logprobs=True))
    assert max(max(completion.ids) for completion in made[0]) < WORDS.vocab_size
