"""Bare additions, scored without generating: against greedy decoding, and on answers that are known."""

import re

import torch

from common.data.arithmetic import drill_documents
from common.data.documents import Document
from common.evaluation.drills import score_drills
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.config import ModelConfig
from common.model.ngram import NGram
from common.model.output import Output
from common.model.transformer import Transformer
from common.tokenization.byte import ByteTokenizer
from common.tokenization.protocol import END_OF_TEXT

WORDS = ByteTokenizer()


class Scripted(torch.nn.Module):
    """After any text it expects the byte that follows it in `text`."""

    context_length, vocab_size = 4096, WORDS.vocab_size

    def __init__(self, text):
        super().__init__()
        self.next = torch.tensor([*WORDS.encode(text), WORDS.specials[END_OF_TEXT]])

    def forward(self, ids, document_ids=None):
        guesses = self.next[: ids.shape[1]].expand(len(ids), -1)
        return Output(torch.nn.functional.one_hot(guesses, self.vocab_size).float(), hidden=[], aux=None)


def test_a_text_that_is_known_by_heart_is_right_and_another_digit_is_counted_where_it_is():
    right = "44+26=70\n65+468=533"
    for said, whole, first, last in (
        (right, 1.0, 1.0, 1.0),
        ("44+26=71\n65+468=533", 0.5, 1.0, 0.5),
        ("44+26=80\n65+468=543", 0.0, 0.5, 1.0),  # a middle digit is in the whole alone
        ("99+99=70\n99+999=533", 1.0, 1.0, 1.0),  # what stands before a result is not asked
    ):
        score = score_drills(Scripted(said), WORDS, [Document("a", "drill", right)])
        assert (score.whole, score.first, score.last) == (whole, first, last), said


def test_a_model_that_has_read_the_drills_knows_them_and_counts_of_others_do_not():
    asked = drill_documents(20, 0, skewed=0.0, split="validation")
    knows = score_drills(NGram.fit_documents(asked, WORDS, 12), WORDS, asked)
    assert knows.whole == knows.last == 1.0
    guesses = score_drills(NGram.fit_documents(drill_documents(200, 0), WORDS, 5), WORDS, asked)
    assert guesses.whole < 0.1
    assert guesses.last < 0.25  # one in ten


def test_it_says_what_greedy_decoding_says():
    documents = drill_documents(12, 1, lines=1)
    model = NGram.fit_documents([*documents[:6], *drill_documents(40, 2)], WORDS, 6)
    engine, right = Engine(model, WORDS), 0
    for document in documents:
        question, result = document.text.split("=")
        made = engine.generate([engine.encode(question + "=")], SamplingParams(temperature=0, max_tokens=len(result)))
        right += made[0][0].text == result
    assert 0 < right < 12
    assert score_drills(model, WORDS, documents).whole == right / 12


def test_what_lies_beyond_the_context_is_not_counted():
    documents = drill_documents(3, 0)
    model = Transformer(ModelConfig(vocab_size=WORDS.vocab_size, context_length=32, layers=1, width=16, heads=2))
    assert score_drills(model, WORDS, documents).whole == 0.0
    assert all(len(re.findall("=", document.text[:31])) >= 2 for document in documents)
