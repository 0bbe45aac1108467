"""The tokenizer against tiktoken and tokenizers on ten thousand strange texts, and against its own promises."""

import json

import pytest
import tokenizers
from gguf import GGUFWriter, TokenType
from hypothesis import given
from hypothesis import strategies as st

from common.data.corpora import shakespeare_scenes
from common.data.shards import bulk_encoder
from common.tokenization.bpe import BPETokenizer, StreamDecoder
from common.tokenization.interop import (
    from_gguf,
    from_hf_json,
    from_tiktoken,
    merges_of_ranks,
    to_characters,
)
from common.tokenization.known import KNOWN, known, known_encoding
from common.tokenization.patterns import (
    GPT2_PATTERN,
    GPT4_GROUPS_PATTERN,
    GPT4_PATTERN,
    O200K_PATTERN,
    SMOLLM_PATTERN,
)
from common.tokenization.protocol import END_OF_TEXT, SPECIALS
from tests.tokenization.strange import strange_texts

TEXTS = strange_texts(10_000)


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([scene.text for scene in shakespeare_scenes()[:80]] + TEXTS[:300], 1024)


def differing(ours, theirs, texts=TEXTS):
    return [text for text in texts if ours(text) != theirs(text)]


def test_round_trip_of_strange_texts(bpe):
    assert [text for text in TEXTS if bpe.decode(bpe.encode(text)) != text] == []


@given(st.binary(max_size=60))
def test_round_trip_of_any_bytes(bpe, raw):
    assert bpe.decode_bytes(bpe.encode_bytes(raw)) == raw


def test_equal_to_tiktoken(bpe):
    assert differing(bpe.encode, bpe.to_tiktoken().encode_ordinary) == []


def test_equal_to_tokenizers_out_and_in(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.to_hf_json(), encoding="utf-8")
    theirs = tokenizers.Tokenizer.from_file(str(path))
    plain = [text for text in TEXTS if not any(name in text for name in SPECIALS)]
    assert differing(bpe.encode, lambda text: theirs.encode(text).ids, plain) == []
    assert theirs.decode(bpe.encode("né — 日本"), skip_special_tokens=False) == "né — 日本"
    assert theirs.token_to_id(END_OF_TEXT) == bpe.specials[END_OF_TEXT]
    assert from_hf_json(path).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("name", KNOWN)
def test_known_tokenizers_have_tiktokens_ids(name):
    assert differing(known(name).encode, known_encoding(name).encode_ordinary) == []


def test_tiktoken_round_trip(bpe):
    assert from_tiktoken(bpe.to_tiktoken()).fingerprint == bpe.fingerprint


def test_smollm_pattern_is_digits_first_then_gpt2(bpe, tmp_path):
    """The one pattern that stands for two steps, against the two steps in tokenizers."""
    found = json.loads(bpe.to_hf_json())
    found["added_tokens"] = []
    found["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    path = tmp_path / "smollm.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), from_hf_json(path)
    assert ours.pattern == SMOLLM_PATTERN
    assert differing(ours.encode, lambda text: theirs.encode(text).ids) == []


def test_from_a_gguf_file(bpe, tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    # As SmolLM2 has it: the specials come first, so that ids are not ranks.
    ordinary = [to_characters(raw) for _, raw in sorted(bpe.tokens.items())]
    writer.add_token_list([*SPECIALS, *ordinary])
    writer.add_token_types([TokenType.CONTROL] * len(SPECIALS) + [TokenType.NORMAL] * len(ordinary))
    merges = [f"{to_characters(bpe.tokens[a])} {to_characters(bpe.tokens[b])}" for a, b in bpe.merges]
    writer.add_token_merges(merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = from_gguf(path)
    same = BPETokenizer(bpe.tokens, bpe.merges, SMOLLM_PATTERN, bpe.specials)
    shift = len(SPECIALS)
    assert differing(read.encode, lambda text: [i + shift for i in same.encode(text)], TEXTS[:2000]) == []
    assert read.specials == {name: i for i, name in enumerate(SPECIALS)}
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        from_gguf(path)


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN, GPT4_GROUPS_PATTERN, O200K_PATTERN, SMOLLM_PATTERN])
def test_patterns_lose_no_character(pattern):
    import regex

    assert [text for text in TEXTS[:3000] if "".join(regex.findall(pattern, text)) != text] == []


@given(st.lists(st.sampled_from("ab c"), max_size=200).map("".join))
def test_long_words_merge_as_short_ones(bpe, text):
    raw = text.encode()
    assert bpe.merge_long(list(raw)) == bpe.merge_short(list(raw))


def test_a_long_line_does_not_take_the_quadratic_way(bpe, monkeypatch):
    expected = bpe.encode("=" * 500)
    monkeypatch.setattr(bpe, "merge_short", lambda ids: pytest.fail("a long word was merged the slow way"))
    assert bpe.encode("=" * 500) == expected


def test_tiktoken_is_refused_where_it_would_give_other_ids(tmp_path):
    single = {i: bytes([i]) for i in range(256)}
    unused = BPETokenizer({**single, 256: b"ab"}, [], GPT2_PATTERN, {END_OF_TEXT: 999})
    crossing = {256: b"bc", 257: b"ab", 258: b"abc"}
    crossed = BPETokenizer({**single, **crossing}, [(98, 99), (97, 98), (257, 99)], GPT2_PATTERN, {END_OF_TEXT: 999})
    for tokenizer in (unused, crossed):
        with pytest.raises(ValueError, match="takes for granted"):
            tokenizer.to_tiktoken()
        assert bulk_encoder(tokenizer)(["abc"]) == [tokenizer.encode("abc")]


@pytest.mark.parametrize("pattern", [r"\w+", r"(\s)?\w+|\s|."])
def test_a_pattern_that_would_lose_text_is_refused(pattern):
    with pytest.raises(ValueError, match="lose text|capturing group"):
        BPETokenizer({i: bytes([i]) for i in range(256)}, [], pattern, {END_OF_TEXT: 999}).encode("hello, you!")


def test_the_one_difference_to_tokenizers_is_special_tokens_in_text(bpe, tmp_path):
    theirs = tokenizers.Tokenizer.from_str(bpe.to_hf_json())
    text = f"a{END_OF_TEXT}b"
    assert theirs.encode(text).ids == bpe.encode(text, allow_special=True) != bpe.encode(text)


def test_specials_in_a_users_text_are_text(bpe):
    text = f"ignore this {END_OF_TEXT} and go on"
    assert bpe.specials[END_OF_TEXT] not in bpe.encode(text)
    assert bpe.encode(text, allow_special=True).count(bpe.specials[END_OF_TEXT]) == 1
    assert bpe.encode(text, allow_special=["<|pad|>"]) == bpe.encode(text)
    with pytest.raises(ValueError, match="special token '<|endoftext|>' at character 12"):
        bpe.encode(text, forbid_special=True)
    assert bpe.encode(text, allow_special=[END_OF_TEXT], forbid_special=True)
    assert bpe.decode(bpe.encode(text, allow_special=True)) == text.replace(END_OF_TEXT, "")


def test_bytes_of_tokens_add_up_to_the_text(bpe):
    for text in TEXTS[:500]:
        assert sum(len(bpe.token_bytes(i)) for i in bpe.encode(text)) == len(text.encode("utf-8"))
    assert bpe.token_bytes(bpe.specials[END_OF_TEXT]) == b""
    with pytest.raises(ValueError, match="not in this vocabulary"):
        bpe.token_bytes(bpe.vocab_size)


def test_streaming_never_emits_half_a_character(bpe):
    for text in TEXTS[:300]:
        stream = StreamDecoder(bpe)
        parts = [stream.push(i) for i in bpe.encode(text)]
        assert "\ufffd" not in "".join(parts).replace("\ufffd", "", text.count("\ufffd"))
        assert "".join(parts) + stream.finish() == text
    cut = StreamDecoder(bpe)
    assert cut.push(0xE2) == ""
    assert cut.finish() == "\ufffd"


def test_save_and_load_keep_every_id(bpe, tmp_path):
    path = tmp_path / "t.json"
    bpe.save(path)
    again = BPETokenizer.load(path)
    assert again.fingerprint == bpe.fingerprint
    assert differing(again.encode, bpe.encode, TEXTS[:1000]) == []
    assert "' the'" in path.with_suffix(".vocab").read_text(encoding="utf-8")


def test_fingerprint_changes_with_anything_that_changes_ids(bpe):
    swapped = [bpe.merges[1], bpe.merges[0], *bpe.merges[2:]]
    others = [
        BPETokenizer(bpe.tokens, swapped, bpe.pattern, bpe.specials),
        BPETokenizer(bpe.tokens, bpe.merges, GPT2_PATTERN, bpe.specials),
        BPETokenizer(bpe.tokens, bpe.merges, bpe.pattern, {**bpe.specials, "<|new|>": bpe.vocab_size}),
        bpe.truncated(1000),
    ]
    assert len({bpe.fingerprint, *(other.fingerprint for other in others)}) == 5
    same = BPETokenizer(dict(reversed(bpe.tokens.items())), bpe.merges, bpe.pattern, bpe.specials)
    assert same.fingerprint == bpe.fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("merges"),
        lambda d: d["merges"].reverse(),
        lambda d: d["tokens"].pop("65"),
        lambda d: d["tokens"].update({"65": "zz"}),
        lambda d: d["specials"].update({END_OF_TEXT: 65}),
        lambda d: d.update(pattern="("),
        lambda d: d.update(pattern=GPT2_PATTERN),
        lambda d: d.update(format="other"),
    ],
)
def test_a_damaged_file_is_named(bpe, tmp_path, damage):
    path = tmp_path / "t.json"
    bpe.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    damage(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.json"):
        BPETokenizer.load(path)


def test_a_cut_file_is_named(bpe, tmp_path):
    path = tmp_path / "t.json"
    bpe.save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="not valid JSON"):
        BPETokenizer.load(path)


def test_truncated_is_what_training_would_have_stopped_at(bpe):
    texts = [scene.text for scene in shakespeare_scenes()[:80]] + TEXTS[:300]
    assert bpe.truncated(512).fingerprint == BPETokenizer.train(texts, 512).fingerprint
    with pytest.raises(ValueError, match="not between"):
        bpe.truncated(2000)


def test_ranks_that_cannot_be_merges_are_refused():
    with pytest.raises(ValueError, match="cannot be made from tokens of lower rank"):
        merges_of_ranks({bytes([i]): i for i in range(256)} | {b"abc": 256})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, "normalises text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer is"),
        ({"model": {"type": "Unigram"}}, "not BPE"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "byte_fallback"),
        ({"added_tokens": [{"id": 999, "content": "x", "special": True, "lstrip": True}]}, "sets lstrip"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": r"\\s+"}, "behavior": "Removed", "invert": False},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                }
            },
            "pre-tokenizer is",
        ),
    ],
)
def test_other_kinds_of_tokenizer_are_refused(bpe, tmp_path, change, message):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**json.loads(bpe.to_hf_json()), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        from_hf_json(path)
