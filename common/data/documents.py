"""Documents, batches, and the windows in which a model is scored on documents.

Every document is opened by `<|endoftext|>` and followed by it: inputs are `<eot> d1 d2 … dn`, targets are
`d1 d2 … dn <eot>`. So the first byte is predicted like any other, and stopping is something a model can learn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from common.tokenization.protocol import Tokenizer, document_end


@dataclass(frozen=True)
class Document:
    """A text with its name. Documents of one `group` (scenes of one play) must not be split between train and test."""

    name: str
    group: str
    text: str


@dataclass(frozen=True)
class Batch:
    """Rows of inputs with the target of each place.

    Attributes:
        loss_mask: True where a target counts in the loss.
        document_ids: equal within a document of a row, and -1 at padding. Attention stays within a document.
    """

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    document_ids: Int[Tensor, "B T"]

    def to(self, device: torch.device) -> "Batch":
        """The same on another device, copied without waiting where that is possible."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def tokenize_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Int[Tensor, "T"]]:
    """Encode each document as `<eot> text <eot>`, int64 ids."""
    end = document_end(tokenizer)
    texts = tokenizer.encode_batch([document.text for document in documents])
    return [torch.tensor([end, *ids, end], dtype=torch.int64) for ids in texts]


def scoring_batches(
    sequences: Sequence[Int[Tensor, "T"]], *, length: int, overlap: int, batch_tokens: int = 16_384
) -> Iterator[Batch]:
    """Cut each sequence into windows in which every target counts exactly once.

    Every window but the first begins `overlap` tokens early; these tokens are context and do not count again. For a model
    that sees at most `overlap` tokens back, the result equals scoring each sequence in one piece.

    Args:
        sequences: the token ids of each document, with the opening and closing `<eot>`.
        length: the number of tokens in a window; must exceed `overlap`.
        batch_tokens: an upper bound on B * T, unless one window alone is longer.
    """
    if length <= overlap:
        raise ValueError(f"windows of {length} tokens cannot overlap by {overlap}: raise length or lower overlap")
    windows = []  # (document, first input, first counted input, end)
    for document, ids in enumerate(sequences):
        total = len(ids) - 1
        start = 0
        while start == 0 or start + overlap < total:
            windows.append((document, start, start + overlap if start else 0, min(start + length, total)))
            start += length - overlap
    # Rows of similar length go together, which saves padding. The order does not matter: nothing is averaged here.
    windows.sort(key=lambda window: window[3] - window[1])
    while windows:
        longest = windows[-1][3] - windows[-1][1]
        rows = [windows.pop() for _ in range(min(len(windows), max(1, batch_tokens // max(1, longest))))]
        shape = (len(rows), longest)
        inputs, targets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        loss_mask = torch.zeros(shape, dtype=torch.bool)
        document_ids = torch.full(shape, -1, dtype=torch.int64)
        for row, (document, start, counted, end) in enumerate(rows):
            size = end - start
            inputs[row, :size] = sequences[document][start:end]
            targets[row, :size] = sequences[document][start + 1 : end + 1]
            loss_mask[row, counted - start : size] = True
            document_ids[row, :size] = document
        yield Batch(inputs, targets, loss_mask, document_ids)
