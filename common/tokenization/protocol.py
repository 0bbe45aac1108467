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


# What ends a document, and what ends a message of an assistant, in the models that `pretrained` reads.
DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<|eot_id|>", MESSAGE_END)
TURN_ENDS = (MESSAGE_END, "<|eot_id|>", END_OF_TEXT, "<|end_of_text|>")


def document_end(tokenizer: Tokenizer) -> int:
    """The id that ends a document, and opens the next. Raises ValueError where the tokenizer has none that we know."""
    for name in DOCUMENT_ENDS:
        if name in tokenizer.specials:
            return tokenizer.specials[name]
    raise ValueError(
        f"none of {', '.join(DOCUMENT_ENDS)} is a special token here; there are {list(tokenizer.specials)[:5]}"
    )
