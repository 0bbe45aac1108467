"""Bits per byte of held-out text: what a language model is worth, in a unit that no tokenizer can change."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from common.data.documents import Document, scoring_batches, tokenize_documents
from common.foundation.statistics import Interval, mean_ci
from common.generation.decode import LOGITS_AT_ONCE, device_of
from common.model.output import LanguageModel, is_bounded
from common.tokenization.protocol import Tokenizer
from common.training.loss import bits, token_nats


@dataclass(frozen=True)
class TextScore:
    """Nats, bytes and tokens of each document. The end-of-text tokens are neither scored nor counted."""

    names: list[str]
    groups: list[str]
    nats: list[float]
    bytes: list[int]
    tokens: list[int]

    def bits_per_byte(self) -> Interval:
        """Over the whole text. The interval resamples documents, so it speaks for documents of these groups (plays)."""
        return mean_ci(self.per_document(), weights=self.bytes)

    def mean(self) -> float:
        """The same number without its interval: for curves, and for a single document."""
        return bits(sum(self.nats)) / sum(self.bytes)

    def nats_per_byte(self) -> Interval:
        """The same number in the unit of the loss: smaller by ln 2, and no better."""
        return mean_ci([value / bits(1) for value in self.per_document()], weights=self.bytes)

    def per_document(self) -> list[float]:
        """Bits per byte of each document, for paired comparisons."""
        return [bits(nats) / size for nats, size in zip(self.nats, self.bytes, strict=True)]

    def by_group(self) -> dict[str, "TextScore"]:
        """The same score for each group (each play)."""
        parts = {}
        for group in sorted(set(self.groups)):
            rows = [i for i, name in enumerate(self.groups) if name == group]
            parts[group] = TextScore(
                [self.names[i] for i in rows],
                [group] * len(rows),
                [self.nats[i] for i in rows],
                [self.bytes[i] for i in rows],
                [self.tokens[i] for i in rows],
            )
        return parts


def token_sizes(tokenizer: Tokenizer) -> Int[Tensor, "V"]:
    """Raw bytes of each token, also where they are no whole character; a special token carries none and is not scored."""
    return torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


@torch.no_grad()  # not inference mode: sharded weights are gathered into what training uses, too
def score_documents(
    model: LanguageModel, tokenizer: Tokenizer, documents: Sequence[Document], *, length: int = 4096
) -> TextScore:
    """Score every byte of every document once.

    A bounded model (see LanguageModel) sees as much context as it can use. Any other is shown windows of `context_length`
    tokens, of which a later one counts its second half only: each byte then has at least half a context before it.

    Args:
        length: tokens in a window; for a bounded model at least twice its context, for any other at most its context.
    Raises:
        ValueError: a document without text, or no documents.
    """
    empty = [document.name for document in documents if not document.text]
    if empty or not documents:
        raise ValueError(f"nothing to score: {'no documents' if not documents else f'{empty[0]} is empty'}")
    sequences = tokenize_documents(documents, tokenizer)
    sizes, device = token_sizes(tokenizer), device_of(model)
    nats = torch.zeros(len(documents), dtype=torch.float64)
    count = torch.zeros(len(documents), dtype=torch.int64)
    tokens = torch.zeros(len(documents), dtype=torch.int64)
    if is_bounded(model):
        length, overlap = max(length, 2 * model.context_length), model.context_length
    else:
        length = min(length, model.context_length)
        overlap = length // 2
    batch_tokens = min(16_384, LOGITS_AT_ONCE // model.vocab_size)
    for batch in scoring_batches(sequences, length=length, overlap=overlap, batch_tokens=batch_tokens):
        logits = model(batch.inputs.to(device), document_ids=batch.document_ids.to(device)).logits.cpu()
        scored = batch.loss_mask & (sizes[batch.targets] > 0)
        owner = batch.document_ids[scored]
        nats.index_add_(0, owner, token_nats(logits, batch.targets)[scored].double())
        count.index_add_(0, owner, sizes[batch.targets][scored])
        tokens.index_add_(0, owner, torch.ones_like(owner))
    names, groups = [document.name for document in documents], [document.group for document in documents]
    return TextScore(names, groups, nats.tolist(), count.tolist(), tokens.tolist())


def shuffle_characters(documents: Sequence[Document], seed: int = 0) -> list[Document]:
    """The control: the characters of each document in random order. Frequencies stay, order goes."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = []
    for document in documents:
        order = torch.randperm(len(document.text), generator=generator).tolist()
        shuffled.append(Document(document.name, document.group, "".join(document.text[i] for i in order)))
    return shuffled
