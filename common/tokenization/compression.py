"""What a vocabulary buys and what it costs: the numbers by which tokenizers are compared."""

from collections.abc import Callable, Sequence

import regex

from common.foundation.statistics import Interval, mean_ci
from common.tokenization.protocol import Tokenizer

Encode = Callable[[str], Sequence[int]]


def bytes_per_token(encode: Encode, texts: Sequence[str]) -> Interval:
    """Bytes that a token holds on average. The interval resamples texts.

    >>> round(bytes_per_token(lambda text: text.split(), ["to be or", "not to be"]).mean, 3)
    2.833
    """
    texts = [text for text in texts if text]
    tokens = [len(encode(text)) for text in texts]
    sizes = [len(text.encode("utf-8")) for text in texts]
    return mean_ci([size / count for size, count in zip(sizes, tokens, strict=True)], weights=tokens)


def fertility(encode: Encode, texts: Sequence[str]) -> Interval:
    """Tokens that a word needs on average; a word is a run of letters and digits, and what surrounds it counts too."""
    words = [len(regex.findall(r"[\p{L}\p{N}]+", text)) for text in texts]
    tokens = [len(encode(text)) for text in texts]
    pairs = [(t / w, w) for t, w in zip(tokens, words, strict=True) if w]
    return mean_ci([ratio for ratio, _ in pairs], weights=[count for _, count in pairs])


def embedding_parameters(tokenizer: Tokenizer, width: int, *, tied: bool = True) -> int:
    """What a vocabulary costs in a model of that width: one matrix, or two if input and output do not share it."""
    return tokenizer.vocab_size * width * (1 if tied else 2)
