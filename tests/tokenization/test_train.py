"""Three trainers, one rule; and the reference implementation, merge for merge."""

from collections import Counter

import pytest
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.corpora import shakespeare_scenes
from common.tokenization.bpe import BPETokenizer
from common.tokenization.interop import merges_of_ranks
from common.tokenization.patterns import GPT4_GROUPS_PATTERN, GPT4_PATTERN
from common.tokenization.train import (
    count_words,
    fast_merges_of_words,
    merge,
    merges_of_text,
    merges_of_words,
)

words = st.dictionaries(st.text("abc ", min_size=1, max_size=12).map(str.encode), st.integers(1, 9), max_size=12)


@settings(max_examples=200, deadline=None)
@given(words, st.integers(0, 40))
def test_fast_equals_naive(words, count):
    assert fast_merges_of_words(Counter(words), count) == merges_of_words(Counter(words), count)


@given(st.binary(max_size=40), st.integers(0, 10))
def test_one_word_is_a_text_in_one_piece(text, count):
    assert merges_of_words(Counter({text: 3}), count) == merges_of_text(text, count)


def test_merge_goes_from_left_to_right():
    assert merge([1, 1, 1, 1, 1], (1, 1), 2) == [2, 2, 1]
    assert merge([1], (1, 1), 2) == [1]
    assert merge([], (1, 1), 2) == []


def test_ties_go_to_the_smallest_pair_of_ids():
    assert merges_of_text(b"xyab", 1) == [(97, 98)]
    assert fast_merges_of_words(Counter({b"xy": 2, b"ab": 2}), 2) == [(97, 98), (120, 121)]


def test_shakespeare_merge_for_merge_as_the_reference():
    texts = [scene.text for scene in shakespeare_scenes()]
    ours = BPETokenizer.train(texts, 4096, specials=())
    reference = rustbpe.Tokenizer()
    reference.train_from_iterator(iter(texts), 4096, pattern=GPT4_PATTERN)
    theirs = [bytes(raw) for raw, _ in sorted(reference.get_mergeable_ranks(), key=lambda item: item[1])]
    assert [ours.tokens[i] for i in range(4096)] == theirs
    assert ours.merges == merges_of_ranks({raw: rank for rank, raw in enumerate(theirs)})
    sample = "".join(texts[:5])
    assert ours.encode(sample) == reference.encode(sample)


@pytest.mark.parametrize("corpus", ["", "a", "ab", "aaa"])
def test_tiny_corpora_do_not_crash_the_trainers(corpus):
    for count in (0, 1, 5):
        assert len(merges_of_text(corpus.encode(), count)) <= count
        assert fast_merges_of_words(count_words([corpus], GPT4_PATTERN), count) == merges_of_words(
            count_words([corpus], GPT4_PATTERN), count
        )


def test_digits_stand_alone_by_default_and_in_groups_on_request():
    assert count_words(["12345"], GPT4_PATTERN) == {b"1": 1, b"2": 1, b"3": 1, b"4": 1, b"5": 1}
    assert count_words(["12345"], GPT4_GROUPS_PATTERN) == {b"123": 1, b"45": 1}


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["abc"], 100, "no room for 256 bytes and 4 specials: need 260"),
        (["abc"], 300, r"too small for vocab_size 300: it has 2 merges, so at most 262"),
        (["", ""], 270, "every text is empty"),
        ([], 270, "every text is empty"),
        ("abc", 270, "put a single one into a list"),
    ],
)
def test_impossible_training_is_refused(texts, size, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train(texts, size)
