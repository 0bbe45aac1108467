"""Examples that stay whole: rows that hold several of them, and a stream of such rows.

An example is a sequence of ids with a mask that says which of them the model should learn to produce: the answer of a
conversation and not its question, say. Short examples waste most of a row on padding, so several are packed into one. They
must not notice: `document_ids` keeps attention and positions apart, and no token of one example is ever the target of
another, because inputs and targets are cut from each example before the examples are joined.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from common.data.documents import Batch
from common.data.stream import Ledger, RowStream
from common.foundation.files import sha256_bytes


@dataclass(frozen=True)
class Example:
    """One sequence to learn from.

    Attributes:
        ids: (N,) the whole sequence, N >= 2.
        loss_mask: (N,) True on the ids that the model should learn to produce; None is all of them. The first id is never a
            target, whatever its mask says: nothing stands before it.
        name: names the example in errors.
    Raises:
        ValueError: fewer than two ids, or a mask of another length.
    """

    ids: Int[Tensor, "N"]
    loss_mask: Bool[Tensor, "N"] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        ids = torch.as_tensor(self.ids, dtype=torch.int64)
        mask = torch.ones_like(ids) if self.loss_mask is None else torch.as_tensor(self.loss_mask)
        if ids.ndim != 1 or len(ids) < 2:
            raise ValueError(
                f"example {self.name!r} has ids of shape {tuple(ids.shape)}: it needs at least two in a row"
            )
        if mask.shape != ids.shape:
            raise ValueError(f"example {self.name!r} has {len(ids)} ids and a loss_mask of shape {tuple(mask.shape)}")
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "loss_mask", mask.bool())

    @property
    def targets(self) -> int:
        """The number of targets that count."""
        return int(self.loss_mask[1:].sum())


def pack(examples: Sequence[Example], length: int, *, pad_id: int = 0, truncate: bool = False) -> tuple[Batch, Ledger]:
    """Put whole examples into rows of `length` inputs: longest first, each into the fullest row that has room (best fit).

    Args:
        length: T; an example of N ids takes N - 1 places.
        pad_id: the input at padding; it counts nowhere.
        truncate: cut the end off examples that are longer than a row, instead of refusing them.
    Returns:
        ((R, T) rows, the account of their targets). Examples are numbered within their row by `document_ids`.
    Raises:
        ValueError: an example is longer than a row. The message names it.
    """
    kept = _fitting(examples, length, truncate)
    rows = _best_fit([len(example.ids) - 1 for example in kept], length)
    batch = _laid_out([[kept[i] for i in row] for row in rows], length, pad_id)
    return batch, _account(examples, kept, batch.inputs.numel())


class ExampleStream(RowStream):
    """Shuffled rows of whole examples; see RowStream for their order.

    Examples are laid out once. What is shuffled in each epoch are the rows: examples that share a row never see each other,
    so it makes no difference to them which ones these are.

    Args:
        length: T, the number of inputs in a row.
        pack: put several examples into a row where they fit; False gives each a row of its own.
        pad_id: the input at padding; it counts nowhere.
        truncate: cut the end off examples that are longer than a row, instead of refusing them.
        order: `batch_size`, `seed`, `shuffle`, `rank` and `world_size`, as for RowStream.
    Raises:
        ValueError: there are no examples, one of them is longer than a row, or a number is impossible.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        length: int,
        pad_id: int,
        pack: bool = True,
        truncate: bool = False,
        **order: Any,
    ) -> None:
        if not examples:
            raise ValueError("a stream of no examples has no batch: give at least one")
        if length < 1:
            raise ValueError(f"need length of at least 1; got {length=}")
        kept = _fitting(examples, length, truncate)
        sizes = [len(example.ids) - 1 for example in kept]
        self._members = _best_fit(sizes, length) if pack else [[i] for i in range(len(kept))]
        super().__init__(len(self._members), **order)
        self.examples, self.length, self.pad_id = kept, length, pad_id
        # What is in which row, so that a state is refused by a stream of other examples, masks or rows.
        content = [np.array([self.rows, *(len(row) for row in self._members)], dtype=np.int64).tobytes()]
        for example in (kept[i] for row in self._members for i in row):
            content += [np.int64(len(example.ids)).tobytes(), example.ids.numpy().tobytes()]
            content.append(example.loss_mask.numpy().tobytes())
        self._content = sha256_bytes(b"".join(content))
        places = self.steps_per_epoch * self.batch_size * self.world_size * length
        self.ledger = _account(examples, kept, places)

    def _batch(self, rows: np.ndarray) -> Batch:
        laid = [[self.examples[i] for i in self._members[row]] for row in rows.tolist()]
        # All ranks take the same number of steps, so the last batch of an epoch is filled up with empty rows.
        return _laid_out(laid + [[]] * (self.batch_size - len(laid)), self.length, self.pad_id)

    def _identity(self) -> dict[str, Any]:
        return {
            "examples": len(self.examples),
            "content": self._content,
            "length": self.length,
            "pad_id": self.pad_id,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


def _fitting(examples: Sequence[Example], length: int, truncate: bool) -> list[Example]:
    """The examples, each of at most `length` inputs. Raises ValueError for a longer one, unless it may be cut."""
    kept = []
    for number, example in enumerate(examples):
        if len(example.ids) - 1 > length:
            if not truncate:
                raise ValueError(
                    f"example {example.name or number!r} has {len(example.ids)} ids and needs {len(example.ids) - 1} "
                    f"places; a row has {length}. Raise length, drop the example, or cut its end off with truncate=True."
                )
            example = replace(example, ids=example.ids[: length + 1], loss_mask=example.loss_mask[: length + 1])
        kept.append(example)
    return kept


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which examples share a row, by their numbers. Longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (places left, row), sorted: the first that is large enough fits best
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(free, (sizes[i], -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - sizes[i], row))
    return rows


def _laid_out(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> Batch:
    """(R, T) tensors of examples that fit."""
    shape = (len(rows), length)
    inputs, targets = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    loss_mask, document_ids = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
    for row, members in enumerate(rows):
        start = 0
        for number, example in enumerate(members):
            place = slice(start, start + len(example.ids) - 1)
            # Shifted within the example: its last id is a target and no input, so that the first id of the next example is
            # the target of nothing.
            inputs[row, place], targets[row, place] = example.ids[:-1], example.ids[1:]
            loss_mask[row, place], document_ids[row, place] = example.loss_mask[1:], number
            start = place.stop
    return Batch(inputs, targets, loss_mask, document_ids)


def _account(examples: Sequence[Example], kept: Sequence[Example], places: int) -> Ledger:
    """Of the targets of all examples, when those that were kept lie in rows of this many places together."""
    pairs, counted = (sum(example.targets for example in some) for some in (examples, kept))
    padded = places - sum(len(example.ids) - 1 for example in kept)
    return Ledger(pairs=pairs, counted=counted, padded=padded, cropped=pairs - counted)
