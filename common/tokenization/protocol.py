"""What every tokenizer of the year can do, and the one definition of the special tokens."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

# Opens every document, and so ends the one before it. Its probability after a text is the probability of stopping.
END_OF_TEXT = "<|endoftext|>"
# Open and close a message of a conversation (ChatML); rendering them is August's.
MESSAGE_START, MESSAGE_END = "<|im_start|>", "<|im_end|>"
# Fills up rows. Never the end-of-text token: a model that must ignore padding could then not learn to stop.
PADDING = "<|pad|>"
SPECIALS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END, PADDING)


class Tokenizer(Protocol):
    """Text to ids and back. `fingerprint` changes whenever anything changes that changes ids."""

    vocab_size: int
    specials: Mapping[str, int]
    fingerprint: str

    def encode(self, text: str, *, allow_special: bool | Collection[str] = False) -> list[int]:
        """Ids of `text`. A special token written in the text is ordinary text unless `allow_special` admits it."""
        ...

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool | Collection[str] = False) -> list[list[int]]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Sequence[int], *, errors: str = "replace") -> str:
        """The text of `ids`; bytes that are not UTF-8 are handled as in bytes.decode."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of one token; a special token has none."""
        ...
