"""Probes of a text evaluation: is the number of bits per byte what it says it is?"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from common.diagnostics.core import Reading, probe
from common.diagnostics.sources import MarkovSource


def order_zero_bits(texts: list[str]) -> float:
    """Entropy of the byte frequencies of the texts, in bits per byte: the best any model without context can do."""
    counts = Counter(b"".join(text.encode("utf-8") for text in texts))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


@probe("beats-unigram", "is the reported number below the entropy of the byte frequencies?")
def beats_unigram(bits_per_byte: Callable, model: Any, heldout_texts: list[str]) -> Reading:
    """The check that everybody makes. Most bugs make the number better, not worse."""
    excess = bits_per_byte(model, heldout_texts) - order_zero_bits(heldout_texts)
    return Reading(excess, 0.0, "bits per byte above the unigram entropy")


@probe("known-source", "is a source of known entropy coded at its entropy rate?")
def known_source(train_and_score: Callable, *, tolerance: float = 0.1) -> Reading:
    """Train and score on a Markov source: below its entropy rate is impossible, far above is a bug as well.

    The tolerance covers sampling noise and what a small model has not learned yet, in bits.
    """
    source = MarkovSource()
    found = train_and_score(source.texts(40, 1500, seed=1), source.texts(10, 1500, seed=2))
    return Reading(abs(found - source.entropy_rate), tolerance, f"|{found:.3f} - {source.entropy_rate:.3f}| bits")


class _Uniform(torch.nn.Module):
    """Every token equally likely: its code length is known without running anything."""

    context_length = 8

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, ids: torch.Tensor, **_: Any) -> Any:
        from common.model.output import Output

        return Output(torch.zeros(*ids.shape, self.vocab_size))


@probe("uniform-model", "does a model that knows nothing read log2(V) bits a token?")
def uniform_model(bits_per_byte: Callable, tokenizer: Any, *, tolerance: float = 1e-3) -> Reading:
    """Exact oracle for the unit: nats, characters for bytes, or a wrong token count all show as a wrong ratio."""
    texts = ["To be, or not to be", "naïve café — déjà vu", "日本語のテキスト", "x"]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    expected = math.log2(tokenizer.vocab_size) * tokens / sum(len(text.encode("utf-8")) for text in texts)
    found = bits_per_byte(_Uniform(tokenizer.vocab_size), texts)
    return Reading(abs(found / expected - 1), tolerance, f"read {found:.3f}, must be {expected:.3f} bits per byte")


@probe("batch-composition", "does the number depend on how documents are grouped into batches?")
def batch_composition(
    bits_per_byte: Callable, model: Any, heldout_texts: list[str], *, tolerance: float = 1e-6
) -> Reading:
    """Reverse and rotate the documents, and cut them to unequal lengths first: a total does not care."""
    texts = [text[: 20 + 97 * (i % 7)] for i, text in enumerate(heldout_texts)]
    orders = [texts, texts[::-1], texts[3:] + texts[:3], sorted(texts, key=len)]
    found = [bits_per_byte(model, order) for order in orders]
    return Reading(max(found) - min(found), tolerance, "spread over four orders of the same documents, bits per byte")


@probe("own-text", "does the model recognise the text it was trained on?")
def own_text(bits_per_byte: Callable, model: Any, train_texts: list[str]) -> Reading:
    """Its own training text must cost less than its byte frequencies say. Ids that mean other bytes do not pass."""
    texts = train_texts[:8]
    return Reading(bits_per_byte(model, texts) - order_zero_bits(texts), 0.0, "bits per byte above the unigram entropy")


@probe("overlap", "does held-out text occur in the training text?")
def overlap(train_texts: list[str], heldout_texts: list[str], *, span: int = 48, tolerance: float = 0.01) -> Reading:
    """Share of held-out spans of `span` characters that stand in the training text word for word."""
    seen = {text[i : i + span] for text in train_texts for i in range(len(text) - span + 1)}
    spans = [text[i : i + span] for text in heldout_texts for i in range(0, len(text) - span + 1, span)]
    share = sum(one in seen for one in spans) / max(1, len(spans))
    return Reading(share, tolerance, f"share of {len(spans)} held-out spans found in training")
