"""The smallest honest tokenizer: one token a byte.

Lossless on any text, nothing to train, nothing to get wrong but the specials. It leaves out compression, which is what
February is about.
"""

import re
from collections.abc import Collection, Sequence

from common.foundation.files import sha256_json
from common.tokenization.protocol import END_OF_TEXT


class ByteTokenizer:
    """Ids 0 to 255 are the bytes; the specials follow.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né")
    [110, 195, 169]
    >>> tokenizer.encode("<|endoftext|>", allow_special=True)     # as a special token
    [256]
    >>> len(tokenizer.encode("<|endoftext|>"))                    # in a user's text: thirteen ordinary bytes
    13
    """

    def __init__(self, specials: Sequence[str] = (END_OF_TEXT,)) -> None:
        if len(set(specials)) != len(specials):
            raise ValueError(f"special tokens must be distinct, got {list(specials)}")
        self.specials = {name: 256 + index for index, name in enumerate(specials)}
        self.vocab_size = 256 + len(specials)
        self.fingerprint = sha256_json({"kind": "byte", "specials": self.specials})

    def encode(self, text: str, *, allow_special: bool | Collection[str] = False) -> list[int]:
        names = list(self.specials) if allow_special is True else list(allow_special or ())
        unknown = [name for name in names if name not in self.specials]
        if unknown:
            raise ValueError(f"{unknown} are not special tokens here; there are {list(self.specials)}")
        if not names:
            return list(text.encode("utf-8"))
        ids: list[int] = []
        longest_first = sorted(names, key=len, reverse=True)
        for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
            ids.extend([self.specials[part]] if part in names else part.encode("utf-8"))
        return ids

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool | Collection[str] = False) -> list[list[int]]:
        return [self.encode(text, allow_special=allow_special) for text in texts]

    def decode(self, ids: Sequence[int], *, errors: str = "replace") -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors=errors)

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return bytes([token_id]) if token_id < 256 else b""
