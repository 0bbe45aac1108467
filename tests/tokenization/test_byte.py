import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.tokenization.byte import ByteTokenizer
from common.tokenization.protocol import END_OF_TEXT


@given(st.text())
def test_round_trip_of_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode("utf-8")
    assert max(ids, default=0) < 256, "user text never becomes a special token"


@given(st.binary())
def test_any_bytes_decode_to_something(raw):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(list(raw)) == raw.decode("utf-8", errors="replace")


def test_specials_only_where_allowed(tokenizer):
    text = f"a{END_OF_TEXT}b"
    assert tokenizer.encode(text, allow_special=True) == [97, 256, 98]
    assert tokenizer.encode(text, allow_special=[END_OF_TEXT]) == [97, 256, 98]
    assert 256 not in tokenizer.encode(text)
    assert tokenizer.decode([97, 256, 98]) == "ab"


def test_longer_special_wins():
    tokenizer = ByteTokenizer(["<a>", "<a><b>"])
    assert tokenizer.encode("<a><b><a>", allow_special=True) == [257, 256]


def test_fingerprint_changes_with_the_ids():
    first, second = ByteTokenizer(), ByteTokenizer([END_OF_TEXT, "<pad>"])
    assert first.fingerprint == ByteTokenizer().fingerprint != second.fingerprint
    assert second.vocab_size == 258


def test_bad_input_is_named(tokenizer):
    with pytest.raises(ValueError, match="outside the vocabulary of 257"):
        tokenizer.token_bytes(257)
    with pytest.raises(ValueError, match="not special tokens here"):
        tokenizer.encode("x", allow_special=["<nope>"])
    with pytest.raises(ValueError, match="distinct"):
        ByteTokenizer(["<a>", "<a>"])
