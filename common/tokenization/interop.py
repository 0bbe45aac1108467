"""The same tokenizer in other formats: tiktoken, Hugging Face's tokenizer.json, GGUF. Ids of plain text are identical.

What is read is refused unless it is byte-level BPE with a pattern that we know or that is given as a regular expression.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from common.foundation.gguf_file import GGUFFile
from common.tokenization.bpe import BPETokenizer, Rules
from common.tokenization.patterns import GPT2_PATTERN, GPT4_GROUPS_PATTERN, SMOLLM_PATTERN
from common.tokenization.train import Pair


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, as vocabularies in JSON and GGUF write them (Radford et al. 2019).

    >>> byte_characters()[ord(" ")], byte_characters()[ord("a")]
    ('Ġ', 'a')
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


INCOMPLETE = Rules(incomplete=True)
_CHARACTERS = byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(_CHARACTERS)}


def to_characters(raw: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in raw)


def from_characters(text: str) -> bytes:
    """Raises ValueError at a character that stands for no byte."""
    try:
        return bytes(_BYTE_OF[character] for character in text)
    except KeyError as error:
        raise ValueError(f"token {text!r} contains {error.args[0]!r}, which stands for no byte") from None


# --- tiktoken ---------------------------------------------------------------------------------------------------------


def to_tiktoken(tokenizer: BPETokenizer, name: str = "spine") -> tiktoken.Encoding:
    """The same ids at tiktoken's speed. Use `encode_ordinary_batch` for bulk work.

    tiktoken takes the id of a token for its rank and merges whatever makes a token, so the merges must be those that the
    ids imply: true for what is trained here. Raises ValueError where it is not.
    """
    id_of = {raw: token for token, raw in tokenizer.tokens.items()}
    if tokenizer.lost or tokenizer.rules.nfc or tokenizer.rules.whole_words:
        raise ValueError(f"tiktoken has no {tokenizer.rules}: encode with the tokenizer itself")
    if not _ids_imply_merges(tokenizer):
        raise ValueError("the merges are not those that the order of the ids implies, which tiktoken takes for granted")
    return tiktoken.Encoding(
        name, pat_str=tokenizer.pattern, mergeable_ranks=id_of, special_tokens=dict(tokenizer.specials)
    )


_checked: dict[str, bool] = {}


def _ids_imply_merges(tokenizer: BPETokenizer) -> bool:
    """Remembered by fingerprint: it takes a second for a large vocabulary."""
    if tokenizer.fingerprint not in _checked:
        try:
            implied = merges_of_ranks({raw: token for token, raw in tokenizer.tokens.items()})
            _checked[tokenizer.fingerprint] = implied == tokenizer.merges
        except ValueError:
            _checked[tokenizer.fingerprint] = False
    return _checked[tokenizer.fingerprint]


def from_tiktoken(encoding: tiktoken.Encoding) -> BPETokenizer:
    """The merges behind a tiktoken encoding such as `tiktoken.get_encoding("gpt2")`."""
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    tokens = {rank: raw for raw, rank in ranks.items()}
    return BPETokenizer(tokens, merges_of_ranks(ranks), encoding._pat_str, encoding._special_tokens)


def merges_of_ranks(ranks: Mapping[bytes, int]) -> list[Pair]:
    """The pair that makes each token: what is left of its bytes when only lower ranks may merge."""
    merges = []
    for raw, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(raw) == 1:
            continue
        parts = [bytes([byte]) for byte in raw]
        while len(parts) > 2:
            found = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            lowest, i = min(found)
            if lowest >= rank:
                raise ValueError(f"token {rank} ({raw!r}) cannot be made from tokens of lower rank")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((ranks[parts[0]], ranks[parts[1]]))
    return merges


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def to_hf_json(tokenizer: BPETokenizer) -> str:
    """The text of a tokenizer.json that `tokenizers.Tokenizer.from_str` and transformers load.

    One difference stays, and it is theirs: that library recognises special tokens in any text. What a user wrote must be
    encoded with `split_special_tokens=True` there, or by our own `encode`.
    """
    ordinary = {to_characters(raw): token for token, raw in sorted(tokenizer.tokens.items())}
    names = {token: text for text, token in ordinary.items()}
    cut = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": text, **flags, "special": text not in tokenizer.rules.visible}
        for text, i in tokenizer.specials.items()
    ]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if tokenizer.rules.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, to_bytes]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": tokenizer.rules.whole_words,
                "vocab": ordinary | tokenizer.specials,
                "merges": [[names[a], names[b]] for a, b in tokenizer.merges],
            },
        },
        ensure_ascii=False,
    )


def from_hf_json(source: str | Path) -> BPETokenizer:
    """Read a tokenizer.json. Raises ValueError that says which part is not byte-level BPE as we know it."""
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8"))
        model = found["model"]
        if model["type"] != "BPE":
            raise ValueError(f"its model is {model['type']}, not BPE")
        for name in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise ValueError(f"its model sets {name}, which would give other ids")
        normalizer = (found.get("normalizer") or {}).get("type")
        if normalizer not in (None, "NFC"):
            raise ValueError(f"it normalises text ({normalizer}), which loses something")
        added = found.get("added_tokens") or []
        for token, flag in itertools.product(added, ("single_word", "lstrip", "rstrip")):
            if token.get(flag):
                raise ValueError(f"its added token {token['content']!r} sets {flag}, which would give other ids")
        visible = tuple(token["content"] for token in added if not token.get("special", True))
        rules = Rules(True, normalizer == "NFC", bool(model.get("ignore_merges")), visible)
        pattern = _hf_pattern(found["pre_tokenizer"])
        specials = {token["content"]: token["id"] for token in added}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return _from_vocabulary(model["vocab"], merges, pattern, specials, rules)
    except (KeyError, TypeError, json.JSONDecodeError, ValueError) as error:
        raise ValueError(f"{source} cannot be read as byte-level BPE: {error}") from error


def _hf_pattern(pre: Mapping[str, Any]) -> str:
    """The regular expression behind a pre-tokenizer."""
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise ValueError("it adds a space in front of the text")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return SMOLLM_PATTERN
    cuts = kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and "Regex" in steps[0]["pattern"]
    if cuts and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
        return steps[0]["pattern"]["Regex"]
    raise ValueError(
        f"its pre-tokenizer is {kinds}; known are ByteLevel, Digits + ByteLevel and isolating Split + ByteLevel"
    )


def _from_vocabulary(
    vocabulary: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    pattern: str,
    specials: Mapping[str, int],
    rules: Rules = INCOMPLETE,
) -> BPETokenizer:
    """From tokens written in GPT-2's characters. A special token may stand in the vocabulary as well."""
    tokens = {token: from_characters(text) for text, token in vocabulary.items() if text not in specials}
    pairs = [(vocabulary[a], vocabulary[b]) for a, b in merges]
    return BPETokenizer(tokens, pairs, pattern, specials, rules)


# --- GGUF -------------------------------------------------------------------------------------------------------------

GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": SMOLLM_PATTERN, "gpt-4": GPT4_GROUPS_PATTERN}
_GGUF_ORDINARY = 1  # llama.cpp's token types: 1 normal, 3 control, 4 user-defined


def from_gguf(path: str | Path) -> BPETokenizer:
    """The tokenizer in the metadata of a GGUF file. Raises ValueError where it is not byte-level BPE as we know it."""
    return tokenizer_of_metadata(GGUFFile(path).metadata, str(path))


def tokenizer_of_metadata(metadata: Mapping[str, Any], where: str) -> BPETokenizer:
    """The same of metadata that has been read already. `where` is named in errors."""
    try:
        read = {name: metadata[f"tokenizer.ggml.{name}"] for name in ("model", "tokens", "merges", "token_type")}
        pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
        if read["model"] != "gpt2":
            raise ValueError(f"its tokenizer is {read['model']!r}, not byte-level BPE ('gpt2')")
        if pre not in GGUF_PATTERNS:
            raise ValueError(f"it cuts text as {pre!r}; known are {', '.join(GGUF_PATTERNS)}")
        kinds = read["token_type"]
        if len(kinds) != len(read["tokens"]):
            raise ValueError(f"{len(read['tokens'])} tokens have {len(kinds)} types")
        vocabulary = {text: token for token, text in enumerate(read["tokens"])}
        specials = {text: token for text, token in vocabulary.items() if kinds[token] != _GGUF_ORDINARY}
        merges = [pair.split(" ") for pair in read["merges"]]
        return _from_vocabulary(vocabulary, merges, GGUF_PATTERNS[pre], specials)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: no readable tokenizer: {error}") from error
