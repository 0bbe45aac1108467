"""From a token stream to batches: every (input, target) pair of the corpus exactly once an epoch.

The stream is `<eot> d1 <eot> d2 … <eot>`. A chunk of T inputs begins where the last one ended, and its targets are the
same tokens one place later, so N tokens give N - 1 pairs and none is lost or counted twice, at any length. The last chunk is
padded and masked. Documents are told apart by `document_ids`, from which common/model/masks.py makes positions and masks.

Order and position are a function of (seed, epoch, step): resuming needs two numbers and no replay. Examples that must stay
whole have a stream of their own, in packing.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from common.data.documents import Batch
from common.foundation.files import sha256_bytes


class Stream(Protocol):
    """An endless source of batches that can be resumed: what a Trainer draws from.

    A stream is a function of its arguments and its state, so that a stream that is made again and given `state_dict()`
    continues with the very batch that the old one would have returned next.

    Attributes:
        epoch: the number of complete passes over the data so far; 0 where there are no passes.
    """

    epoch: int

    def next_batch(self) -> Any:
        """The next batch of this process, of whatever type the objective prepares."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values that JSON can hold."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there. Raises ValueError if the state belongs to another stream, and then changes nothing."""
        ...


@dataclass(frozen=True)
class Ledger:
    """Where the targets of an epoch went. `counted + cropped == pairs`: nothing disappears.

    Attributes:
        pairs: (input, target) pairs that should count.
        counted: pairs that count in some row.
        padded: places of the rows that hold no token.
        cropped: pairs that were cut off.
    """

    pairs: int
    counted: int
    padded: int
    cropped: int = 0


class RowStream:
    """The order in which rows are read: shuffled anew in each epoch, dealt out to ranks, resumable to the exact batch.

    Subclasses say what is in the rows (`_batch`) and what tells their data from other data (`_identity`).

    Args:
        rows: how many there are.
        batch_size: B, the number of rows in a batch of this rank.
        seed: decides the order, together with the number of the epoch.
        shuffle: False reads the rows in their own order.
        rank, world_size: this process and the number of processes. Rows are shuffled first and dealt out afterwards, so that
            all ranks together see what a single one would.
    Raises:
        ValueError: a number is impossible.
    """

    def __init__(
        self, rows: int, *, batch_size: int, seed: int = 0, shuffle: bool = True, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"need batch_size of at least 1 and 0 <= rank < world_size; got {batch_size=}, {rank=}, {world_size=}"
            )
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch, self.consumed = 0, 0  # consumed: rows of this epoch that all ranks together have taken
        self._order = self._order_of(0)

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches of this rank in an epoch; the last may have rows that are all padding."""
        return -(-self.rows // (self.batch_size * self.world_size))

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.rows)
        return np.random.default_rng((self.seed, epoch)).permutation(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end, from where the stream stands."""
        while True:
            yield self.next_batch()

    def epoch_batches(self) -> Iterator[Batch]:
        """Yield the batches that are left of this epoch."""
        for _ in range(-(-(self.rows - self.consumed) // (self.batch_size * self.world_size))):
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """The next batch of this rank; the state is already that of the one after."""
        first = self.consumed + self.rank * self.batch_size
        batch = self._batch(self._order[first : first + self.batch_size])
        self.consumed += self.batch_size * self.world_size
        if self.consumed >= self.rows:
            self.epoch, self.consumed = self.epoch + 1, 0
            self._order = self._order_of(self.epoch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What a snapshot must keep. It counts rows and not steps, so it holds for another number of ranks as well."""
        return {"epoch": self.epoch, "consumed": self.consumed, "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there. Raises ValueError if the state belongs to another order or another stream."""
        mine = self._identity()
        if state["identity"] != mine:
            raise ValueError(
                f"this state belongs to another stream: {state['identity']} against {mine}. "
                f"Resume with the same {', '.join(mine)}."
            )
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self._order = self._order_of(self.epoch)

    def _batch(self, rows: np.ndarray) -> Batch:
        """The rows with these numbers, (batch_size, T); what is missing at the end of an epoch is all padding."""
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        """What makes two streams the same, as plain values."""
        raise NotImplementedError


class BatchStream(RowStream):
    """Shuffled chunks of a token sequence, each a row; see RowStream for their order.

    Args:
        tokens: the stream; anything that can be sliced and has a length, such as `Shards` or a NumPy array.
        length: T, the number of inputs in a row.
        end_of_text: the id that opens each document.
        order: `batch_size`, `seed`, `shuffle`, `rank` and `world_size`, as for RowStream.
    Raises:
        ValueError: the stream has fewer than two tokens, or a number is impossible.
    """

    def __init__(self, tokens: Sequence[int], *, length: int, end_of_text: int, **order: Any) -> None:
        if len(tokens) < 2:
            raise ValueError(f"a stream of {len(tokens)} tokens has no (input, target) pair: it needs at least two")
        if length < 1:
            raise ValueError(f"need length of at least 1; got {length=}")
        super().__init__(-(-(len(tokens) - 1) // length), **order)
        self.tokens, self.length, self.end_of_text = tokens, length, end_of_text
        named = getattr(tokens, "fingerprint", None)  # shards know theirs; an array is hashed once, whole
        self._content = named or sha256_bytes(np.ascontiguousarray(tokens, dtype=np.int64).tobytes())

    @property
    def ledger(self) -> Ledger:
        """The account of one epoch, over all ranks."""
        rows = self.steps_per_epoch * self.batch_size * self.world_size
        pairs = len(self.tokens) - 1
        return Ledger(pairs=pairs, counted=pairs, padded=rows * self.length - pairs)

    def _batch(self, rows: np.ndarray) -> Batch:
        shape = (self.batch_size, self.length)
        inputs = torch.full(shape, self.end_of_text)
        targets, document_ids = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
        loss_mask = torch.zeros(shape, dtype=torch.bool)
        for row, chunk in enumerate(rows.tolist()):
            start = chunk * self.length
            ids = torch.from_numpy(np.asarray(self.tokens[start : start + self.length + 1]).astype(np.int64))
            size = len(ids) - 1
            inputs[row, :size], targets[row, :size], loss_mask[row, :size] = ids[:-1], ids[1:], True
            document_ids[row, :size] = (ids[:-1] == self.end_of_text).cumsum(0)
        return Batch(inputs, targets, loss_mask, document_ids)

    def _identity(self) -> dict[str, Any]:
        return {
            "tokens": len(self.tokens),
            "content": self._content,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


class RandomWindows:
    """Windows at random places of one long text, without epochs and documents: every batch is a function of its number.

    This is what nanoGPT does. It is simple, but some pairs are seen often and others never.
    """

    epoch = 0

    def __init__(self, tokens: Sequence[int], *, length: int, batch_size: int, seed: int = 0) -> None:
        if len(tokens) <= length:
            raise ValueError(f"windows of {length} pairs need more than {length} tokens, got {len(tokens)}")
        self.tokens = torch.from_numpy(np.asarray(tokens).astype(np.int64))
        self.length, self.batch_size, self.seed, self.number = length, batch_size, seed, 0

    def next_batch(self) -> Batch:
        """The next batch; the state is already that of the one after."""
        rng = np.random.default_rng((self.seed, self.number))
        places = rng.integers(0, len(self.tokens) - self.length, self.batch_size)
        rows = self.tokens[torch.from_numpy(places)[:, None] + torch.arange(self.length + 1)]  # (B, T + 1)
        self.number += 1
        one = torch.ones(rows.shape[0], self.length, dtype=torch.int64)
        return Batch(rows[:, :-1], rows[:, 1:], one.bool(), one)

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.seed:
            raise ValueError(f"this state belongs to seed {state['seed']}, the stream has {self.seed}")
        self.number = state["number"]
