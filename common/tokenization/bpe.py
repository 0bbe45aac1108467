"""The tokenizer of the year: byte-level byte pair encoding.

Any text is bytes, so any text can be encoded and comes back unchanged. Text is cut into words by a pattern; within a word,
adjacent tokens are merged, lowest rank first. Words repeat, so a cache answers most of them.

What it does not do: train on anything but words (no merges across spaces), normalise text, or add a space in front.
"""

import codecs
import heapq
import itertools
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import regex
import tiktoken

from common.foundation.files import read_json, sha256_json, write_json
from common.tokenization.patterns import GPT4_PATTERN
from common.tokenization.protocol import SPECIALS
from common.tokenization.train import Pair, count_words, fast_merges_of_words, finder

CACHED_WORDS = 1 << 18  # words remembered; the cache is emptied when it is full
LONG_WORD = 64  # bytes; longer words are merged with a heap, and not remembered


@dataclass(frozen=True)
class Rules:
    """Where a published tokenizer departs from plain byte-level BPE.

    Attributes:
        incomplete: its vocabulary lacks some of the 256 bytes (SmolLM2: control characters); they are dropped from text
            before merging, as the tokenizers library does.
        nfc: text is brought into Unicode's composed form first (Qwen).
        whole_words: a word that is a token is taken whole, whatever the merges say (Llama 3).
        visible: special tokens that are text when they are decoded (Qwen's <think>).
    """

    incomplete: bool = False
    nfc: bool = False
    whole_words: bool = False
    visible: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Only what is not the default, so that fingerprints of plain tokenizers stay what they are."""
        found = asdict(self) | {"visible": list(self.visible)}
        return {name: value for name, value in found.items() if value and name != "incomplete"}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Self:
        """The way back. A vocabulary shows by itself what it lacks."""
        named = {name: found[name] for name in ("nfc", "whole_words") if name in found}
        return cls(incomplete=True, visible=tuple(found.get("visible", ())), **named)


class BPETokenizer:
    """Byte-level BPE from its parts.

    Args:
        tokens: id -> raw bytes of every token that is not special; ids need not be contiguous.
        merges: pairs of ids in the order of their rank. The merged bytes must be a token.
        pattern: cuts text into words, see patterns.py. It must match every character of any text.
        specials: text -> id of the special tokens.
        rules: what published tokenizers do differently; ours need none of it. See Rules.
    Attributes:
        vocab_size: one more than the largest id.
        lost: the bytes that it lacks.
        fingerprint: changes whenever anything changes that changes ids.
    """

    def __init__(
        self,
        tokens: Mapping[int, bytes],
        merges: Sequence[Pair],
        pattern: str,
        specials: Mapping[str, int],
        rules: Rules | None = None,
    ) -> None:
        self.tokens, self.merges, self.pattern = dict(tokens), [(a, b) for a, b in merges], pattern
        self.specials, self.rules = dict(specials), rules or Rules()
        self.vocab_size = 1 + max(itertools.chain(self.tokens, self.specials.values()))
        id_of = {raw: token for token, raw in self.tokens.items()}
        self.lost = frozenset(byte for byte in range(256) if bytes([byte]) not in id_of)
        self._check(id_of)
        self._byte_ids = [id_of.get(bytes([byte]), -1) for byte in range(256)]
        self._rank = {
            pair: (rank, id_of[self.tokens[pair[0]] + self.tokens[pair[1]]]) for rank, pair in enumerate(self.merges)
        }
        self._find = finder(pattern)
        self._cache: dict[str, list[int]] = {}
        self._raw = {**self.tokens, **dict.fromkeys(self.specials.values(), b"")}
        self._raw |= {self.specials[name]: name.encode("utf-8") for name in self.rules.visible}
        self._whole = {raw: [token] for raw, token in id_of.items()} if self.rules.whole_words else {}
        self.fingerprint = sha256_json(
            {
                "kind": "bpe",
                "tokens": [[token, raw.hex()] for token, raw in sorted(self.tokens.items())],
                "merges": self.merges,
                "pattern": pattern,
                "specials": self.specials,
                **self.rules.as_dict(),
            }
        )

    def _check(self, id_of: dict[bytes, int]) -> None:
        if self.lost and not self.rules.incomplete:
            raise ValueError(f"a byte-level tokenizer needs all 256 bytes; it lacks {sorted(self.lost)[:5]}")
        if len(id_of) != len(self.tokens):
            raise ValueError(f"{len(self.tokens) - len(id_of)} tokens have the same bytes as another one")
        taken = set(self.tokens) & set(self.specials.values())
        if taken:
            raise ValueError(f"ids {sorted(taken)[:5]} are ordinary tokens and special tokens at once")
        if len(set(self.specials.values())) != len(self.specials):
            raise ValueError("two special tokens have the same id")
        for rank, (a, b) in enumerate(self.merges):
            if a not in self.tokens or b not in self.tokens or self.tokens[a] + self.tokens[b] not in id_of:
                raise ValueError(f"merge {rank} joins {a} and {b}, which do not make a token of this vocabulary")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        specials: Sequence[str] = SPECIALS,
        pattern: str = GPT4_PATTERN,
    ) -> Self:
        """Learn a vocabulary: 256 bytes, merges (most frequent pair, then smallest pair of ids), then the specials.

        Args:
            texts: read once, one at a time.
            vocab_size: tokens in all, the specials included.
        Raises:
            ValueError: no room for bytes and specials, no text, or a text too small for so many merges.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be an iterable of texts; put a single one into a list")
        least = 256 + len(specials)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size {vocab_size} has no room for 256 bytes and {len(specials)} specials: need {least}"
            )
        words = count_words(texts, pattern)
        if not words:
            raise ValueError("nothing to learn from: every text is empty")
        merges = fast_merges_of_words(words, vocab_size - least)
        if len(merges) < vocab_size - least:
            raise ValueError(
                f"the corpus ({len(words):,} distinct words) is too small for vocab_size {vocab_size}: it has "
                f"{len(merges)} merges, so at most {least + len(merges)}. Lower vocab_size or add text."
            )
        tokens = {byte: bytes([byte]) for byte in range(256)}
        for new, (a, b) in enumerate(merges, start=256):
            tokens[new] = tokens[a] + tokens[b]
        return cls(tokens, merges, pattern, {name: len(tokens) + i for i, name in enumerate(specials)})

    def truncated(self, vocab_size: int) -> Self:
        """The tokenizer with only the first merges: what training would have stopped at. For trained ones.

        >>> BPETokenizer.train(["aaabdaaabac"], 259, specials=[]).truncated(257).decode([256])
        'aa'
        """
        merges = self.merges[: vocab_size - 256 - len(self.specials)]
        tokens = {token: raw for token, raw in self.tokens.items() if token < 256 + len(merges)}
        if len(tokens) + len(self.specials) != vocab_size:
            raise ValueError(
                f"vocab_size {vocab_size} is not between {256 + len(self.specials)} and {self.vocab_size}, "
                "or ids are not in the order of the merges"
            )
        specials = {name: len(tokens) + i for i, name in enumerate(self.specials)}
        return type(self)(tokens, merges, self.pattern, specials, self.rules)

    # --- encoding ---------------------------------------------------------------------------------------------------

    def encode(
        self, text: str, *, allow_special: bool | Collection[str] = False, forbid_special: bool = False
    ) -> list[int]:
        """Ids of `text`.

        Args:
            allow_special: which special tokens may be recognised in the text: none (the default: text from a user is
                text), all (True) or those named.
            forbid_special: raise ValueError if the text contains a special token that is not allowed.
        """
        names = tuple(self.specials) if allow_special is True else tuple(allow_special or ())
        unknown = [name for name in names if name not in self.specials]
        if unknown:
            raise ValueError(f"{unknown} are not special tokens here; there are {list(self.specials)}")
        if forbid_special:
            found = [name for name in self.specials if name not in names and name in text]
            if found:
                raise ValueError(f"the text contains the special token {found[0]!r} at character {text.find(found[0])}")
        if not names:
            return self._encode_ordinary(text)
        longest_first = sorted(names, key=len, reverse=True)
        parts = regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text)
        ids: list[int] = []
        for part in parts:
            ids.extend([self.specials[part]] if part in names else self._encode_ordinary(part))
        return ids

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool | Collection[str] = False) -> list[list[int]]:
        """`encode` of each text. For bulk work `to_tiktoken` gives the same ids faster."""
        return [self.encode(text, allow_special=allow_special) for text in texts]

    def encode_bytes(self, raw: bytes) -> list[int]:
        """Ids of any bytes, UTF-8 or not: `b"".join(map(token_bytes, ids)) == raw`."""
        return self._encode_ordinary(raw.decode("utf-8", errors="surrogateescape"))

    def _encode_ordinary(self, text: str) -> list[int]:
        if self.rules.nfc:
            text = unicodedata.normalize("NFC", text)
        ids: list[int] = []
        cache, words = self._cache, self._find(text)
        if sum(map(len, words)) != len(text):
            raise ValueError(f"the pattern does not match every character of {text[:40]!r}: encoding would lose text")
        for word in words:
            known = cache.get(word)
            if known is None:
                known = self._encode_word(word)
            ids.extend(known)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        raw = word.encode("utf-8", errors="surrogateescape")
        if raw in self._whole:
            return self._whole[raw]
        if self.lost:
            raw = bytes(byte for byte in raw if byte not in self.lost)
        if len(raw) > LONG_WORD:
            return self.merge_long([self._byte_ids[byte] for byte in raw])
        ids = self.merge_short([self._byte_ids[byte] for byte in raw])
        if len(self._cache) >= CACHED_WORDS:
            self._cache.clear()
        self._cache[word] = ids
        return ids

    def merge_short(self, ids: list[int]) -> list[int]:
        """Merge the pair of lowest rank, leftmost first, until none is left. Quadratic in the length of the word."""
        rank = self._rank
        while len(ids) > 1:
            best, at = None, -1
            for i in range(len(ids) - 1):
                found = rank.get((ids[i], ids[i + 1]))
                if found is not None and (best is None or found < best):
                    best, at = found, i
            if best is None:
                break
            ids[at : at + 2] = [best[1]]
        return ids

    def merge_long(self, ids: list[int]) -> list[int]:
        """The same in n log n steps: a heap of candidate pairs over a linked list. For words such as a line of dashes."""
        size = len(ids)
        after, before = list(range(1, size + 1)), list(range(-1, size - 1))
        alive = [True] * size
        heap: list[tuple[int, int, int, int, int]] = []  # (rank, place, new id, left id, right id)

        def offer(i: int) -> None:
            j = after[i] if i >= 0 else size
            if i >= 0 and j < size:
                found = self._rank.get((ids[i], ids[j]))
                if found is not None:
                    heapq.heappush(heap, (found[0], i, found[1], ids[i], ids[j]))

        for i in range(size - 1):
            offer(i)
        while heap:
            _, i, new, left, right = heapq.heappop(heap)
            j = after[i]
            if not alive[i] or j >= size or ids[i] != left or ids[j] != right:
                continue  # one of the two has been merged with another since
            ids[i], alive[j] = new, False
            after[i] = after[j]
            if after[j] < size:
                before[after[j]] = i
            offer(before[i])
            offer(i)
        return [token for token, there in zip(ids, alive, strict=True) if there]

    # --- decoding ---------------------------------------------------------------------------------------------------

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of a token; a special token has none. Raises ValueError for an id that is no token."""
        try:
            return self._raw[token_id]
        except KeyError:
            raise ValueError(f"token id {token_id} is not in this vocabulary of {self.vocab_size}") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Sequence[int], *, errors: str = "replace") -> str:
        """The text of `ids`. A cut through a character shows as U+FFFD; see `StreamDecoder`."""
        return self.decode_bytes(ids).decode("utf-8", errors=errors)

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file, atomically, and a list of tokens to read beside it (`.vocab`)."""
        path = Path(path)
        write_json(path, self.as_dict())
        readable = [f"{token:>7}  {show_token(raw)}" for token, raw in sorted(self.tokens.items())]
        readable += [f"{token:>7}  {name}  (special)" for name, token in self.specials.items()]
        path.with_suffix(".vocab").write_text("\n".join(readable) + "\n", encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the fingerprint that a reader must find again."""
        return {
            "format": "spine-bpe-1",
            "fingerprint": self.fingerprint,
            "pattern": self.pattern,
            "specials": self.specials,
            "tokens": {str(token): raw.hex() for token, raw in self.tokens.items()},
            "merges": [list(pair) for pair in self.merges],
            **self.rules.as_dict(),
        }

    def to_tiktoken(self, name: str = "spine") -> tiktoken.Encoding:
        """The same ids at tiktoken's speed: what bulk jobs use. See `interop.to_tiktoken`."""
        from common.tokenization import interop

        return interop.to_tiktoken(self, name)

    def to_hf_json(self) -> str:
        """The text of a Hugging Face tokenizer.json with the same ids. See `interop.to_hf_json`."""
        from common.tokenization import interop

        return interop.to_hf_json(self)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises ValueError that names the file if it is damaged or was altered."""
        found = read_json(path)
        try:
            if found["format"] != "spine-bpe-1":
                raise ValueError(f"its format is {found['format']!r}, not 'spine-bpe-1'")
            tokens = {int(token): bytes.fromhex(raw) for token, raw in found["tokens"].items()}
            made = cls(tokens, found["merges"], found["pattern"], found["specials"], Rules.of(found))
        except (KeyError, TypeError, ValueError, AttributeError, regex.error) as error:
            raise ValueError(f"{path} is not a tokenizer: {error!r}") from error
        if made.fingerprint != found["fingerprint"]:
            raise ValueError(
                f"{path} says fingerprint {found['fingerprint'][:12]}…, its content has {made.fingerprint[:12]}…: "
                "the file was altered. Train the tokenizer again."
            )
        return made


def show_token(raw: bytes) -> str:
    """A token for people: text in quotes, or bytes where it is no text.

    >>> show_token(b" the"), show_token(b"\\xe2\\x80")
    ("' the'", 'e2 80')
    """
    try:
        return repr(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return raw.hex(" ")


class StreamDecoder:
    """Text from tokens as they come, never half a character.

    >>> from common.tokenization.byte import ByteTokenizer
    >>> stream = StreamDecoder(ByteTokenizer())
    >>> [stream.push(byte) for byte in "né".encode()], stream.finish()
    (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, which may be none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD if the stream ended within a character."""
        return self._decoder.decode(b"", final=True)
