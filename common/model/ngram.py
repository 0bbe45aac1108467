"""Count-based language models: from nothing at all (uniform) to interpolated n-grams of any order.

An n-gram model predicts the next token from the n - 1 before it, by counting what followed them in the training text.
A long context is informative but rare, a short one common but vague, so the two are mixed at every length with the
weights of Witten and Bell (1991):

    P_k(w | h) = (count(h w) + types(h) * P_{k-1}(w | h')) / (count(h) + types(h))

where h' is h without its oldest token, count(h) how often h was followed by anything, types(h) by how many different
tokens, and P_0 = 1 / V. A context with many different continuations has shown that it may show a new one.

There are two implementations. `NaiveNGram` is the formula; `NGram` computes the same numbers with one tensor operation per
level, behind the interface that the transformer has. Left out on purpose: Kneser-Ney counts, which gain a few per cent more.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from common.data.documents import Document, tokenize_documents
from common.model.output import Output
from common.model.registry import registered
from common.tokenization.protocol import Tokenizer

PARTS = ("keys", "offsets", "tokens", "counts")  # the arrays of a level


class NaiveNGram:
    """The formula, word for word. It is slow, and serves for reading and for checking `NGram`."""

    def __init__(self, sequences: Iterable[Sequence[int]], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in sequences:
            for t in range(1, len(ids)):
                for length in range(min(order - 1, t) + 1):  # tokens of context: 0 for the unigram
                    self.followers[tuple(ids[t - length : t])][ids[t]] += 1

    def probability(self, context: Sequence[int], token: int) -> float:
        """P(token | context). Only the last order - 1 tokens of the context matter."""
        context = tuple(context[max(0, len(context) - self.order + 1) :])
        probability = 1 / self.vocab_size
        for length in range(min(self.order, len(context) + 1)):
            followers = self.followers.get(context[len(context) - length :])
            if followers is None:  # never seen, so no longer context was either
                break
            count, types = followers.total(), len(followers)
            probability = (followers[token] + types * probability) / (count + types)
        return probability


@registered("ngram")
class NGram(nn.Module):
    """The same model as sorted arrays: a trie of contexts, one level for each context length.

    Level k holds the contexts of k tokens that were seen. A context is found from the one that is a token shorter, by
    the key `shorter * V + older token`; so keys stay small for any order. Each context owns a slice of (token, count).

    Memory is proportional to the distinct n-grams seen. A forward pass computes one row of V probabilities for each
    *distinct* context in the batch and level, and gathers.
    """

    bounded = True

    def __init__(self, vocab_size: int, levels: Sequence[dict[str, Tensor]]) -> None:
        super().__init__()
        if not levels:
            raise ValueError("an n-gram model needs at least one level; NGram.fit makes them")
        self.vocab_size = vocab_size
        self.order = len(levels)
        self.context_length = max(1, self.order - 1)
        for k, level in enumerate(levels):
            for name in PARTS:
                self.register_buffer(f"level{k}_{name}", level[name])

    @classmethod
    def fit(cls, sequences: Sequence[Int[Tensor, "T"]], order: int, vocab_size: int) -> Self:
        """Count every n-gram of up to `order` tokens. Contexts do not reach across sequences.

        Args:
            sequences: token ids of each document, the first of which is never predicted (it opens the document).
            order: 1 for unigrams, 5 for contexts of four tokens.
        Raises:
            ValueError: order below 1, an id outside the vocabulary, or nothing to count.
        """
        if order < 1:
            raise ValueError(f"order must be at least 1 (unigrams), got {order}")
        if not sum(max(0, len(ids) - 1) for ids in sequences):
            raise ValueError("nothing to count: every sequence has fewer than two tokens")
        ids = np.concatenate([np.asarray(sequence) for sequence in sequences])
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"token ids run from {ids.min()} to {ids.max()}, outside a vocabulary of {vocab_size}")
        lengths = np.array([len(sequence) for sequence in sequences])
        starts = np.cumsum(lengths) - lengths
        age = np.arange(len(ids)) - np.repeat(starts, lengths)  # tokens before this one in its document
        where = np.flatnonzero(age >= 1)  # the tokens that are predicted
        context = np.zeros(len(where), dtype=np.int64)  # at level 0 everybody has the empty context
        keys = np.zeros(1, dtype=np.int64)
        levels = []
        for k in range(order):
            if k:
                older = age[where] >= k
                where, context = where[older], context[older]
                keys, context = np.unique(context * vocab_size + ids[where - k], return_inverse=True)
            entries, counts = np.unique(context * vocab_size + ids[where], return_counts=True)
            owner, tokens = np.divmod(entries, vocab_size)
            offsets = np.searchsorted(owner, np.arange(len(keys) + 1))
            arrays = {"keys": keys, "offsets": offsets, "tokens": tokens, "counts": counts}
            levels.append({name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()})
        return cls(vocab_size, levels)

    @classmethod
    def fit_documents(cls, documents: Sequence[Document], tokenizer: Tokenizer, order: int) -> Self:
        """`fit` on texts. Each document is opened and closed with the end-of-text token."""
        return cls.fit(tokenize_documents(documents, tokenizer), order, tokenizer.vocab_size)

    def truncated(self, order: int) -> Self:
        """The model of a lower order, which the same counts contain: no second pass over the text is needed."""
        if not 1 <= order <= self.order:
            raise ValueError(f"a model of order {self.order} contains the orders 1 to {self.order}, not {order}")
        return type(self)(self.vocab_size, self.levels()[:order])

    def describe(self) -> dict[str, Any]:
        """See registry.Describable. How many contexts there are is not described: `resize` takes it from the tensors."""
        return {"kind": "ngram", "order": self.order, "vocab_size": self.vocab_size}

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> Self:
        levels = [{name: torch.zeros(0, dtype=torch.int64) for name in PARTS} for _ in range(described["order"])]
        return cls(described["vocab_size"], levels)

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make room for tensors of these shapes, by name: what was counted decides the size, unlike in a network."""
        for name, buffer in list(self.named_buffers()):
            if name in shapes:
                self.register_buffer(name, buffer.new_empty(tuple(shapes[name])))

    def level(self, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(keys, offsets, tokens, counts) of the contexts of k tokens."""
        return tuple(getattr(self, f"level{k}_{name}") for name in PARTS)

    def levels(self) -> list[dict[str, Tensor]]:
        """All levels, in the form that the constructor takes."""
        return [dict(zip(PARTS, self.level(k), strict=True)) for k in range(self.order)]

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        pad_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Output:
        """Log-probabilities of the next token at each position: logits, already normalised. See LanguageModel."""
        if ids.ndim != 2:
            raise ValueError(f"ids must have shape (B, T), got {tuple(ids.shape)}")
        if ids.numel() and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(
                f"token ids run from {int(ids.min())} to {int(ids.max())}, outside a vocabulary of {self.vocab_size}: "
                "was the text encoded with another tokenizer?"
            )
        level, context = self._deepest_context(ids, self._visible(ids, document_ids, pad_mask))
        logits = ids.new_zeros((*ids.shape, self.vocab_size), dtype=torch.float32)  # (B, T, V)
        for k in range(self.order):
            here = level == k  # (B, T): positions whose longest known context has k tokens
            if here.any():
                distinct, back = torch.unique(context[here], return_inverse=True)
                logits[here] = self._probabilities(k, distinct).log().float()[back]
        return Output(logits)

    @staticmethod
    def _visible(ids: Tensor, document_ids: Tensor | None, pad_mask: Tensor | None) -> Int[Tensor, "B T"]:
        """(B, T): how many tokens, counted back from each position and including it, are of its document and no padding."""
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)  # (B, T)
        fresh = position == 0
        if document_ids is not None:
            fresh = fresh | (document_ids != document_ids.roll(1, dims=1))
        if pad_mask is not None:
            fresh = fresh | pad_mask.roll(1, dims=1)
        start = torch.where(fresh, position, 0).cummax(dim=1).values
        visible = position - start + 1
        return visible if pad_mask is None else torch.where(pad_mask, 0, visible)

    def _deepest_context(self, ids: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """(level, context id), both (B, T), of the longest context known from training that ends at each position."""
        level, context = torch.zeros_like(ids), torch.zeros_like(ids)
        alive = torch.ones_like(ids, dtype=torch.bool)
        for k in range(1, self.order):
            keys = self.level(k)[0]
            older = ids.roll(k - 1, dims=1)  # the token k - 1 back; where it wrapped around, `visible` says so
            wanted = context * self.vocab_size + older
            found = torch.searchsorted(keys, wanted).clamp(max=max(0, len(keys) - 1))
            alive = alive & (visible >= k) & (keys[found] == wanted if len(keys) else False)
            level, context = torch.where(alive, k, level), torch.where(alive, found, context)
        return level, context

    def _probabilities(self, k: int, contexts: Int[Tensor, "N"]) -> Tensor:
        """P(. | context) for contexts of level k, shape (N, V), in double precision."""
        keys, offsets, tokens, counts = self.level(k)
        if k == 0:
            shorter = torch.full((1, self.vocab_size), 1 / self.vocab_size, dtype=torch.float64, device=keys.device)
        else:
            parents, back = torch.unique(keys[contexts] // self.vocab_size, return_inverse=True)
            shorter = self._probabilities(k - 1, parents)[back]
        start, types = offsets[contexts], offsets[contexts + 1] - offsets[contexts]
        row = torch.repeat_interleave(torch.arange(len(contexts), device=keys.device), types)
        first = torch.cumsum(types, 0) - types  # where each context's slice begins in the flattened list
        entry = torch.arange(len(row), device=keys.device) - first[row] + start[row]
        seen = torch.zeros_like(shorter).index_put_((row, tokens[entry]), counts[entry].double())
        total = seen.sum(dim=1, keepdim=True)
        types = types[:, None].double()
        return (seen + types * shorter) / (total + types)

    def num_parameters(self) -> int:
        """The number of stored counts, which are the nearest thing to parameters that an n-gram model has."""
        return sum(len(self.level(k)[3]) for k in range(self.order))

    def flops_per_token(self, context: int = 0) -> int:
        """Operations for one position if no context is shared: about four for each of the V tokens and each level."""
        return 4 * self.order * self.vocab_size
