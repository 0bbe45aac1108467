"""The fast form of `recompute`: a model with a cache is shown each token once, and the logits are the same.

The rows of a batch share one cache, flush right, with padding on the left of shorter ones. Rows join it, leave it, and are
read anew when they outgrow the context, without the other rows being read again.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.generation import decode
from common.generation.decode import GrowingRow, context_start, device_of, padded
from common.model.cache import Cache
from common.model.output import LanguageModel

COMPACT = 4  # ended rows are taken out of the cache when they are at least one in this many


class Weights:
    """The state of a model's weights at one moment, to notice later that they have changed.

    Three things are compared. Autograd counts every write to a tensor that it knows of: an optimizer's step, `copy_`,
    `load_state_dict`, arithmetic in place under `no_grad`. Addresses are compared, so that a parameter that was exchanged,
    added, removed or moved is seen. And because some writes are not counted (torch's fused optimizers, `.data`,
    `.numpy()`), a few numbers of each tensor are compared as well: an update of all weights cannot hide from them, a change
    of a single number can. Not seen either: weights that a module keeps outside its parameters and buffers, and changes of
    other attributes, such as an adapter that is switched off.

    Args:
        numbers: also note numbers of each tensor, which `are_those_of` needs; it takes some microseconds a tensor.
    """

    def __init__(self, model: LanguageModel, *, numbers: bool = True) -> None:
        # The tensors are held, not only their addresses: a freed address could be given to the next tensor.
        self.tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        # A tensor that was made in inference mode counts no versions, so nobody can tell whether it has changed.
        self.countable = not any(tensor.is_inference() for tensor in self.tensors)
        self.versions = [tensor._version for tensor in self.tensors] if self.countable else []
        self.numbers = [_some_of(tensor) for tensor in self.tensors] if numbers else []

    def written(self) -> bool:
        """Whether a counted write has happened since. Quick enough for every step."""
        return self.countable and [tensor._version for tensor in self.tensors] != self.versions

    def are_those_of(self, model: LanguageModel) -> bool:
        """Whether the model still has these tensors with the same numbers in them. False if it cannot be told."""
        now = Weights(model)
        return (
            self.countable
            # The old tensors are still held, so an equal address is the same memory.
            and now.addresses == self.addresses
            and now.versions == self.versions
            and all(map(torch.equal, now.numbers, self.numbers))
        )


def _some_of(tensor: Tensor) -> Tensor:
    """About sixteen of its numbers, evenly spread, in memory of their own."""
    return tensor.detach().flatten()[:: max(1, tensor.numel() // 16)].cpu().clone()


class PrefixCache:
    """What is left of the last row that was read: the next one may begin alike, as the turns of a conversation do.

    It is worth nothing once the weights have changed, and is not used then (see Weights for which changes are seen).
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self.tokens: list[int] = []
        self.cache: Cache | None = None
        self.weights: Weights | None = None

    def keep(self, tokens: list[int], cache: Cache, weights: Weights) -> None:
        """Remember the keys and values of these tokens, which were computed with these weights."""
        self.tokens, self.cache, self.weights = tokens, cache, weights

    def shared(self, window: Sequence[int], model: LanguageModel) -> int:
        """How many first tokens of `window` need not be read again. The last one must be, because its logits are wanted."""
        if self.cache is None:
            return 0
        if not self.weights.are_those_of(model):  # gallery: baselines/stale-prefix
            self.clear()
            return 0
        most = min(len(self.tokens), len(window) - 1)
        return next((i for i in range(most) if self.tokens[i] != window[i]), most)


class Cached:
    """`recompute` for a model with `new_cache`. Call it with the rows that are running, in any order.

    Rows whose last token alone is missing from the cache are shown that token. All others are read whole: rows that are new,
    rows that have outgrown the context since (context_start), and everything after a change of the weights.

    Args:
        model: see Transformer.
        prefix: begin a single row from what an earlier one left there, and leave this one there.
    """

    def __init__(self, model: LanguageModel, prefix: PrefixCache | None = None) -> None:
        self.model, self.device, self.prefix = model, device_of(model), prefix
        self.forget()

    def forget(self) -> None:
        """Read every row again at the next call."""
        self.cache: Cache | None = None
        # The rows in the cache in its order, some of which may have ended, and which of their tokens it holds: [start, end).
        self.held: dict[GrowingRow, tuple[int, int]] = {}
        self.weights = Weights(self.model, numbers=self.prefix is not None)

    def __call__(self, rows: list[GrowingRow]) -> Float[Tensor, "B V"]:
        """Logits of the token after each row."""
        if self.weights.written():  # keys and values of the old weights do not belong to queries of the new ones
            self.forget()
        length = self.model.context_length
        spans = {row: (context_start(len(row.tokens), length), len(row.tokens)) for row in rows}
        going = [row for row, (start, end) in spans.items() if self.held.get(row) == (start, end - 1)]
        if len(going) == len(rows):
            logits = self._advance(going)
        elif going:
            logits = self._join(rows, going)
        else:
            self.cache = None  # freed before the new one is made: both at once would double the peak of memory
            cache, which, logits = self._read(rows)
            self.cache, self.held = cache.fork(which, capacity=self._capacity(rows)), dict.fromkeys(rows)
            logits = logits[which]
        self.held.update(spans)
        if self.prefix is not None and len(self.held) == 1:
            ((row, (start, end)),) = self.held.items()
            if start == 0:
                self.prefix.keep(row.tokens[:end], self.cache, self.weights)
            else:  # the beginning of the row is not in the cache any more
                self.prefix.clear()
        return logits

    def _advance(self, going: list[GrowingRow]) -> Float[Tensor, "B V"]:
        """Logits after these rows of the cache, (len(going), V): each is shown its newest token."""
        if self.cache.length == self.cache.capacity:
            # None of these rows is full: the places went to padding, to a row that has ended, or to one that has outgrown
            # the context and is read anew. Gathering drops the places on the left that none of these rows needs.
            self.cache = Cache.gather([(self.cache, self._places(going))], capacity=self._capacity(going))
            self.held = {row: self.held[row] for row in going}
        elif COMPACT * (len(self.held) - len(going)) >= len(self.held):
            # Copying the cache for each row that ends would cost more than it saves; a quarter of the rows pays for it.
            self.cache = self.cache.fork(self._places(going))
            self.held = {row: self.held[row] for row in going}
        # Rows that are still in the cache but have ended are shown their last token again, and the logits are dropped. Their
        # positions stay below `context_length`, because the cache never has more places than that.
        newest = torch.tensor([[row.tokens[-1]] for row in self.held], device=self.device)  # (B, 1)
        logits = self.model(newest, cache=self.cache).logits[:, -1]
        return logits if list(self.held) == going else logits[self._places(going)]

    def _join(self, rows: list[GrowingRow], going: list[GrowingRow]) -> Float[Tensor, "B V"]:
        """Logits after rows of which only those in `going` can go on from the cache. The others are read, and join it."""
        known = set(going)
        joining = [row for row in rows if row not in known]
        here = self._advance(going)
        cache, which, there = self._read(joining)
        together = [*going, *joining]
        self.cache = Cache.gather(
            [(self.cache, self._places(going)), (cache, which)], capacity=self._capacity(together)
        )
        self.held = dict.fromkeys(together)
        return torch.cat([here, there[which]])[self._places(rows)]

    def _places(self, rows: list[GrowingRow]) -> list[int]:
        """Where these rows are in the batch of the cache."""
        place = {row: i for i, row in enumerate(self.held)}
        return [place[row] for row in rows]

    def _capacity(self, rows: list[GrowingRow]) -> int:
        """Places that these rows will need until the last of them ends or outgrows the context."""
        length = self.model.context_length
        return min(
            length,
            max(
                len(row.tokens) - context_start(len(row.tokens), length) + max(1, row.params.max_tokens - row.generated)
                for row in rows
            ),
        )

    def _read(self, rows: list[GrowingRow]) -> tuple[Cache, list[int], Float[Tensor, "W V"]]:
        """Read every distinct window of these rows once.

        Returns:
            (cache, which, logits): a cache with W windows, the number of each row's window in it, the logits after each.
        """
        length = self.model.context_length
        number: dict[tuple[int, ...], int] = {}  # of each distinct window
        windows = (tuple(row.tokens[context_start(len(row.tokens), length) :]) for row in rows)
        which = [number.setdefault(window, len(number)) for window in windows]
        ids, pad_mask = padded(list(number), left=True, device=self.device)  # (W, T)
        batch, width = ids.shape
        cache, ragged = self.model.new_cache(batch, width), bool(pad_mask.any())
        known = 0
        if self.prefix is not None and batch == 1:
            known = self.prefix.shared(next(iter(number)), self.model)
        if known:  # begin with the keys and values of the shared beginning, and read the rest
            cache = self.prefix.cache.fork([0], capacity=max(width, self.prefix.cache.length))
            cache.truncate(known)
            ids, pad_mask = ids[:, known:], pad_mask[:, known:]
        # The logits of a long prompt need not all be in memory at once: only those of the last token are wanted.
        tokens_at_once = max(1, decode.LOGITS_AT_ONCE // (batch * self.model.vocab_size))
        for part, pads in zip(ids.split(tokens_at_once, dim=1), pad_mask.split(tokens_at_once, dim=1), strict=True):
            logits = self.model(part, cache=cache, pad_mask=pads if ragged else None).logits[:, -1]
        return cache, which, logits
