"""What a transformer remembers between calls: keys and values (or latents) of the tokens so far, in contiguous tensors.

Every layer holds two tensors of shape (B, N, capacity, W): keys and values for standard attention, with N key-value heads;
latent and rotary key for latent attention, with N = 1. The cache also records which places are padding and to which document
each belongs, because the masks of a later query must be those of a single pass.

The capacity is fixed, and exceeding it is an error, not a wrong answer. Paged and recurrent forms come later.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from common.model.config import ModelConfig


def cache_shapes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """(N, W) of the two tensors of a layer. N · W numbers are stored in each of them for every token."""
    if config.attention == "latent":
        return (1, config.latent_width), (1, config.rope_head_width)
    return (config.groups, config.d_head), (config.groups, config.d_head)


class Cache:
    """Keys and values of one batch.

    Args:
        config: of the model.
        batch: B.
        capacity: places for tokens, padding included.
        dtype: of the stored numbers. One that is narrower than the model's saves memory and loses digits.
    Attributes:
        length: places in use.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache needs at least one row and one place, got {batch=}, {capacity=}")
        self.config, self.batch, self.capacity, self.length = config, batch, capacity, 0
        with torch.inference_mode(False):  # so that it may be made in one mode and used in the other
            self.layers = [
                tuple(torch.zeros(batch, n, capacity, w, dtype=dtype, device=device) for n, w in cache_shapes(config))
                for _ in range(config.layers)
            ]
            self.pad_mask = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
            self.document_ids = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.has_pads = self.has_documents = False

    def begin(self, shape: tuple[int, int], document_ids: Tensor | None, pad_mask: Tensor | None) -> None:
        """Announce T more tokens: check that they fit, and record their documents and padding. `length` stays as it is."""
        batch, count = shape
        if batch != self.batch:
            raise ValueError(f"the cache holds {self.batch} rows, the input has {batch}: fork it, or make another")
        end = self.length + count
        if end > self.capacity:  # gallery: attention/cache-overflow
            raise ValueError(
                f"{self.length} tokens in the cache and {count} new ones need {end} places; it has {self.capacity}. "
                "Make it larger, or truncate it."
            )
        new = slice(self.length, end)
        self.document_ids[:, new] = self._last_document() if document_ids is None else document_ids
        self.pad_mask[:, new] = False if pad_mask is None else pad_mask
        self.has_documents |= document_ids is not None
        self.has_pads |= pad_mask is not None and bool(pad_mask.any())

    def _last_document(self) -> Tensor | int:
        """The document of the last real token of each row, (B, 1): new tokens without ids belong to it."""
        if not self.length:
            return 0
        place = torch.arange(self.length, device=self.pad_mask.device)
        last = torch.where(self.pad_mask[:, : self.length], -1, place).amax(dim=1, keepdim=True).clamp(min=0)
        return self.document_ids.gather(1, last)

    def seen(self, count: int) -> tuple[Tensor | None, Tensor | None]:
        """(document ids, pad mask), each (B, S), with the announced tokens included; None where no mask is needed."""
        end = self.length + count
        return (
            self.document_ids[:, :end] if self.has_documents else None,
            self.pad_mask[:, :end] if self.has_pads else None,
        )

    def append(self, layer: int, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new entries of a layer, each (B, N, T, W), and return all entries so far. `advance` commits them."""
        if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
            raise RuntimeError("a cache is for inference: call the model under torch.inference_mode() or no_grad()")
        end = self.length + first.shape[2]
        for store, new in zip(self.layers[layer], (first, second), strict=True):
            store[:, :, self.length : end] = new
        return tuple(store[:, :, :end].to(first.dtype) for store in self.layers[layer])  # as wide as the queries again

    def advance(self, count: int) -> None:
        """Count the announced tokens, after every layer has appended them. Called once per forward pass, not per layer."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget everything from this place on; 0 empties the cache."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length
        self.has_pads = bool(self.pad_mask[:, :length].any())
        self.has_documents = self.has_documents and length > 0

    def fork(self, rows: Sequence[int] | None = None, *, capacity: int | None = None) -> Self:
        """An independent copy of these rows, all of them by default. A row may be named several times.

        `fork([0] * 8)` turns one prefilled prompt into eight rows to sample from. `capacity` gives the copy more room.
        """
        index = torch.arange(self.batch) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        if len(index) == 0 or index.min() < 0 or index.max() >= self.batch:
            raise ValueError(f"rows must name some of 0 to {self.batch - 1}, got {index.tolist()}")
        capacity = self.capacity if capacity is None else capacity
        if capacity < self.length:
            raise ValueError(f"{self.length} tokens do not fit into a capacity of {capacity}")
        sample, index = self.layers[0][0], index.to(self.pad_mask.device)
        copy = type(self)(self.config, len(index), capacity, dtype=sample.dtype, device=sample.device)
        used = slice(0, self.length)
        for mine, theirs in zip(self.layers, copy.layers, strict=True):
            for source, target in zip(mine, theirs, strict=True):
                target[:, :, used] = source[index, :, used]
        copy.pad_mask[:, used], copy.document_ids[:, used] = self.pad_mask[index, used], self.document_ids[index, used]
        copy.length, copy.has_pads, copy.has_documents = self.length, self.has_pads, self.has_documents
        return copy

    @classmethod
    def gather(cls, parts: Sequence[tuple[Self, Sequence[int]]], *, capacity: int | None = None) -> Self:
        """One new cache of chosen rows of several caches, so that rows which began at different times can run together.

        All rows are moved flush right: they end at the same place, as the next token needs it. Padding that every chosen row
        has on its left is dropped. Positions do not change, because they count real tokens and not places.

        Args:
            parts: (cache, numbers of its rows) for each source; the rows come out in this order. All caches must be of one
                model, and padding must be on the left.
            capacity: places of the new cache; by default as many as are used.
        Raises:
            ValueError: no rows, rows that do not exist, caches of different models, or too small a capacity.
        """
        parts = [(cache, list(rows)) for cache, rows in parts if len(rows)]
        if not parts:
            raise ValueError("no rows to gather: name at least one")
        first = parts[0][0]
        for cache, rows in parts:
            if cache.config != first.config:
                raise ValueError("these caches were made for different models: their rows cannot run together")
            if min(rows) < 0 or max(rows) >= cache.batch:
                raise ValueError(f"rows must name some of 0 to {cache.batch - 1}, got {rows}")
        # The longest chosen row decides how many places are used: what every row has as padding before that is dropped.
        used = max(cache.length - int(cache._left_padding()[rows].min()) for cache, rows in parts)
        capacity = max(used, 1) if capacity is None else capacity
        if capacity < used:
            raise ValueError(f"{used} tokens do not fit into a capacity of {capacity}")
        sample = first.layers[0][0]
        batch = sum(len(rows) for _, rows in parts)
        made = cls(first.config, batch, capacity, dtype=sample.dtype, device=sample.device)
        made.pad_mask[:, :used] = True  # what no source fills is padding
        start = 0
        for cache, rows in parts:
            count = min(used, cache.length)  # columns that this source brings, the newest ones
            source, place = slice(cache.length - count, cache.length), slice(used - count, used)
            target = slice(start, start + len(rows))
            index = torch.as_tensor(rows, device=cache.pad_mask.device)
            for theirs, mine in zip(cache.layers, made.layers, strict=True):
                for old, new in zip(theirs, mine, strict=True):
                    new[target, :, place] = old[index, :, source]
            made.pad_mask[target, place] = cache.pad_mask[index, source]
            made.document_ids[target, place] = cache.document_ids[index, source]
            start += len(rows)
        made.length = used
        made.has_pads = bool(made.pad_mask[:, :used].any())
        made.has_documents = any(cache.has_documents for cache, _ in parts)
        return made

    def _left_padding(self) -> Tensor:
        """How many places each row has before its first real token, (B,)."""
        real = ~self.pad_mask[:, : self.length]
        return torch.where(real.any(dim=1), real.int().argmax(dim=1), self.length)

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values, used or not."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def state(self) -> dict[str, Tensor]:
        """The used part as named tensors, ready for safetensors. `Cache.from_state` takes it back."""
        found = {
            f"layer{i}_{name}": tensor[:, :, : self.length].clone()
            for i, layer in enumerate(self.layers)
            for name, tensor in zip(("first", "second"), layer, strict=True)
        }
        found["pad_mask"] = self.pad_mask[:, : self.length].clone()
        found["document_ids"] = self.document_ids[:, : self.length].clone()
        found["has_documents"] = torch.tensor(self.has_documents)
        return found

    @classmethod
    def from_state(cls, config: ModelConfig, state: dict[str, Any], capacity: int | None = None) -> Self:
        """The cache that `state` saved. Raises ValueError if the shapes do not belong to this model."""
        batch, length = state["pad_mask"].shape
        sample = state["layer0_first"]
        made = cls(config, batch, capacity or max(length, 1), dtype=sample.dtype, device=sample.device)
        for i, layer in enumerate(made.layers):
            for name, store in zip(("first", "second"), layer, strict=True):
                saved = state.get(f"layer{i}_{name}")
                expected = (batch, store.shape[1], length, store.shape[3])
                if saved is None or saved.shape != expected:
                    has = None if saved is None else tuple(saved.shape)
                    raise ValueError(f"cache state: layer {i} has {has}, this model needs {expected}")
                store[:, :, :length] = saved
        if f"layer{len(made.layers)}_first" in state:
            raise ValueError(f"cache state: it has more layers than the {len(made.layers)} of this model")
        made.pad_mask[:, :length], made.document_ids[:, :length] = state["pad_mask"], state["document_ids"]
        made.length, made.has_pads = length, bool(state["pad_mask"].any())
        made.has_documents = bool(state["has_documents"])
        return made
