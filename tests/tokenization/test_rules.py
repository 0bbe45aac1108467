"""Published tokenizers that depart from plain byte-level BPE, against the tokenizers library on strange texts."""

import json
import re
import unicodedata

import pytest
import tokenizers

from common.foundation.files import sha256_json
from common.tokenization.bpe import BPETokenizer, Rules
from common.tokenization.chat import encode_chat
from common.tokenization.interop import from_hf_json, to_characters
from common.tokenization.protocol import END_OF_TEXT, SPECIALS
from tests.tokenization.strange import strange_texts

THINK = ("<think>", "</think>")
NAMES = (*SPECIALS, *THINK)
COMPOSED = "\u0338|e\u0301|\u1100\u1161\u11a8|\u212b|\u03d2\u0301|q\u0323\u0307|q\u0307\u0323"
ODD = "\ufb01|\u0344|\u0958|\U0001d15e|\uf900"
BYTES = "\x01|\x02 |a\x01b| \x0bthe|\x7f|t\x01he| th\x02e|\x01hapax|\x02b | \x01thefifth"
MARKS = "|".join([COMPOSED, ODD, BYTES]).split("|")


def written(count, seed):
    """Strange texts with what the rules are about between their pieces."""
    made = strange_texts(count, seed)
    made += ["".join(pair) for pair in zip(MARKS * (count // len(MARKS)), strange_texts(count, seed + 1), strict=False)]
    made += ["".join(MARKS[i::k]) for k in range(1, 6) for i in range(k)] + ["", *MARKS]
    # What a letter is depends on the version of Unicode, and libraries have different ones: only what is long assigned.
    return ["".join(c for c in text if unicodedata.category(c) != "Cn") for text in made]


TEXTS = written(510, seed=7)
PLAIN = [re.sub(r"<[^<>]*>", "", text) for text in TEXTS]  # tokenizers would find the names
LOST = [1, 2, 11, 127, 0xC0, 0xF5]


@pytest.fixture(scope="module")
def base():
    """Tokens, of which some cannot be made by merging, and merges that are not in the order of the ids."""
    texts = ["the them then there é ñ 日本 don't = == 12 fifth"] * 3 + strange_texts(60, seed=1)
    plain = BPETokenizer.train(texts, 500, specials=NAMES)
    tokens = dict(plain.tokens)
    for i, word in enumerate(["hapax", " there", "thefifth", "日本é", "the", "a\x01b", "\x02b", "fi", "x" * 70]):
        if word.encode() not in tokens.values():
            tokens[plain.vocab_size + i] = word.encode()
    return BPETokenizer(tokens, [*plain.merges[5:], *plain.merges[:5]], plain.pattern, plain.specials)


KINDS = {
    "plain": {},
    "incomplete": {"lost": True},
    "nfc": {"nfc": True},
    "whole words": {"whole": True},
    "visible": {"visible": True},
    "all": {"lost": True, "nfc": True, "whole": True, "visible": True},
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def file_of(base, folder, *, lost=False, nfc=False, whole=False, visible=False):
    """A tokenizer.json with these departures, written as other people write it."""
    found = json.loads(base.to_hf_json())
    model = found["model"]
    if lost:
        gone = set(to_characters(bytes(LOST)))
        keep = {text: i for text, i in model["vocab"].items() if len(text) > 1 or text not in gone}
        made = {a + b for a, b in model["merges"] if not {a, b} & gone}
        model["vocab"] = keep
        model["merges"] = [pair for pair in model["merges"] if set(pair) <= set(keep) and "".join(pair) in made]
    model["ignore_merges"] = whole
    model["merges"] = [" ".join(pair) for pair in model["merges"]]  # the older form
    if nfc:
        found["normalizer"] = {"type": "NFC"}
    for token in found["added_tokens"]:
        token["special"] = not (visible and token["content"] in THINK)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


@pytest.fixture
def pair(base, tmp_path, kind):
    path = file_of(base, tmp_path, **KINDS[kind])
    return from_hf_json(path), tokenizers.Tokenizer.from_file(str(path))


def differing(ours, theirs, texts):
    return [text for text in texts if ours(text) != theirs.encode(text, add_special_tokens=False).ids]


@by_kind
def test_ids_are_those_of_tokenizers(pair):
    ours, theirs = pair
    assert len(set(PLAIN)) > 1000
    assert differing(ours.encode, theirs, PLAIN) == []


@by_kind
def test_ids_with_names_of_special_tokens(pair):
    ours, theirs = pair
    ends = [("", ""), NAMES[:2], NAMES[-2:]]
    texts = [a + text + b for i, text in enumerate(TEXTS) for a, b in [ends[i % 3]]]
    texts += [name + mark for name in NAMES for mark in MARKS]
    assert len(texts) > 1000
    assert differing(lambda text: ours.encode(text, allow_special=True), theirs, texts) == []


def test_every_rule_changes_ids(base, tmp_path):
    """Texts on which a tokenizer without the rule would be wrong: else the comparison above says nothing."""
    plain = from_hf_json(file_of(base, tmp_path))
    for kind in ("incomplete", "nfc", "whole words"):
        other = from_hf_json(file_of(base, tmp_path, **KINDS[kind]))
        assert sum(plain.encode(text) != other.encode(text) for text in PLAIN[::3]) > 15, kind


@by_kind
def test_out_and_in_again(pair, tmp_path):
    ours, _ = pair
    path = tmp_path / "again.json"
    path.write_text(ours.to_hf_json(), encoding="utf-8")
    again, theirs = from_hf_json(path), tokenizers.Tokenizer.from_file(str(path))
    assert again.fingerprint == ours.fingerprint
    assert again.rules == ours.rules
    assert differing(ours.encode, theirs, PLAIN[::3]) == []
    assert [text for text in PLAIN[::3] if again.encode(text) != ours.encode(text)] == []


@by_kind
def test_saved_and_loaded(pair, tmp_path):
    ours, _ = pair
    ours.save(tmp_path / "saved.json")
    again = BPETokenizer.load(tmp_path / "saved.json")
    assert (again.fingerprint, again.rules) == (ours.fingerprint, ours.rules)
    assert [text for text in TEXTS[::3] if again.encode(text) != ours.encode(text)] == []


def test_fingerprints_of_plain_tokenizers_know_nothing_of_rules(base):
    described = {
        "kind": "bpe",
        "tokens": [[token, raw.hex()] for token, raw in sorted(base.tokens.items())],
        "merges": base.merges,
        "pattern": base.pattern,
        "specials": base.specials,
    }
    parts = (base.tokens, base.merges, base.pattern, base.specials)
    for rules in (None, Rules(), Rules(incomplete=True)):
        assert BPETokenizer(*parts, rules).fingerprint == sha256_json(described)
    others = [Rules(nfc=True), Rules(whole_words=True), Rules(visible=THINK), Rules(visible=THINK[:1])]
    assert len({BPETokenizer(*parts, rules).fingerprint for rules in (None, *others)}) == 5


def test_a_rule_that_was_altered_in_a_file_is_noticed(base, tmp_path):
    path = tmp_path / "t.json"
    base.save(path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert not {"nfc", "whole_words", "visible"} & set(found)
    for change in ({"nfc": True}, {"whole_words": True}, {"visible": ["<think>"]}, {"visible": ["other"]}):
        path.write_text(json.dumps({**found, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"t\.json"):
            BPETokenizer.load(path)


@pytest.mark.parametrize("kind", ["incomplete", "nfc", "whole words", "all"])
def test_tiktoken_is_refused(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match="tiktoken has no Rules"):
        ours.to_tiktoken()


def test_a_vocabulary_that_lacks_bytes_is_only_read_where_that_is_said(base):
    tokens = {token: raw for token, raw in base.tokens.items() if raw != b"\x01" and b"\x01" not in raw}
    merges = [(a, b) for a, b in base.merges if a in tokens and b in tokens]
    with pytest.raises(ValueError, match="all 256 bytes; it lacks"):
        BPETokenizer(tokens, merges, base.pattern, base.specials)
    ours = BPETokenizer(tokens, merges, base.pattern, base.specials, Rules(incomplete=True))
    assert ours.lost == {1}
    assert ours.encode("\x01") == []
    assert ours.encode("the\x01se") == ours.encode("these")


def test_visible_tokens_are_text_when_they_are_decoded(base, tmp_path):
    ours = from_hf_json(file_of(base, tmp_path, visible=True))
    assert ours.rules.visible == THINK
    ids = ours.encode(f"<think>né</think>{END_OF_TEXT}", allow_special=True)
    assert ours.decode(ids) == "<think>né</think>"
    assert ours.token_bytes(ours.specials["<think>"]) == b"<think>"
    assert ours.specials["<think>"] not in ours.encode("<think>")
    theirs = tokenizers.Tokenizer.from_str(ours.to_hf_json())
    assert theirs.decode(ids, skip_special_tokens=True) == "<think>né</think>"
    hidden = from_hf_json(file_of(base, tmp_path))
    assert hidden.decode(ids) == "né"
    prompt = encode_chat([{"role": "user", "content": "<think>"}], "{{ messages[0].content }}</think>", ours).ids
    assert [i for i in prompt if i in ours.specials.values()] == [ours.specials["</think>"]]


def test_text_in_composed_form_comes_back(base, tmp_path):
    ours = from_hf_json(file_of(base, tmp_path, nfc=True))
    for text in PLAIN[::3]:
        composed = unicodedata.normalize("NFC", text)
        assert ours.decode(ours.encode(text)) == composed
        assert ours.encode(composed) == ours.encode(text)


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_added_tokens_that_take_more_than_their_name_are_refused(base, tmp_path, flag):
    path = file_of(base, tmp_path)
    found = json.loads(path.read_text(encoding="utf-8"))
    found["added_tokens"][1][flag] = True
    path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"added token '<\|im_start\|>' sets {flag}"):
        from_hf_json(path)


def test_a_smaller_vocabulary_keeps_its_rules():
    trained = BPETokenizer.train(["the there them"] * 3, 264)
    rules = Rules(nfc=True, visible=("<|pad|>",))
    ours = BPETokenizer(trained.tokens, trained.merges, trained.pattern, trained.specials, rules)
    assert ours.truncated(262).rules == rules
