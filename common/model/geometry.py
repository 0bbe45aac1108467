"""The geometry of embeddings: which tokens are near each other, and how much nearer than chance."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from common.tokenization.protocol import Tokenizer


def directions(embeddings: Float[Tensor, "V C"]) -> Float[Tensor, "V C"]:
    """The rows minus their mean, scaled to length one. What all rows have in common says nothing about any of them."""
    embeddings = embeddings.detach().float()
    return F.normalize(embeddings - embeddings.mean(dim=0), dim=1)


def nearest(unit: Float[Tensor, "V C"], token: int, count: int) -> list[tuple[int, float]]:
    """The `count` other tokens with the largest cosine to this one, as (token, cosine)."""
    cosines = unit @ unit[token]
    cosines[token] = -torch.inf
    best = cosines.topk(count)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def spelling_pairs(tokenizer: Tokenizer, letters: int = 3) -> list[tuple[int, int]]:
    """Pairs of tokens that are one word written in two ways: with or without a space before it, or with a capital.

    To the model they are unrelated ids; whatever brings their embeddings together was learned from how they are used.
    """
    number = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if i not in tokenizer.specials.values()}
    words = [word for word in number if len(word) >= letters and word.isalpha() and word.islower()]
    pairs = [(word, other) for word in words for other in (b" " + word, word.capitalize()) if other in number]
    pairs += [(b" " + w, b" " + w.capitalize()) for w in words if {b" " + w, b" " + w.capitalize()} <= set(number)]
    return [(number[a], number[b]) for a, b in pairs]


def pair_cosines(unit: Float[Tensor, "V C"], pairs: Sequence[tuple[int, int]]) -> Float[Tensor, "N"]:
    """The cosine of each pair."""
    first, second = torch.tensor(pairs).T
    return (unit[first] * unit[second]).sum(dim=1)


def cohesion(unit: Float[Tensor, "V C"], group: Sequence[int]) -> Float[Tensor, "N"]:
    """For each token of a group, its mean cosine to the other tokens of the group."""
    rows = unit[torch.tensor(group)]
    return (rows @ rows.sum(dim=0) - rows.square().sum(dim=1)) / (len(rows) - 1)


def like_in_frequency(group: Sequence[int], counts: Int[np.ndarray, "V"]) -> list[int]:
    """For each token of a group, a token outside it that is about as frequent: a control for the effect of frequency."""
    order = np.argsort(-counts, kind="stable")
    taken, found = set(group), []
    for token in group:
        rank = int(np.flatnonzero(order == token)[0])
        nearest_ranks = sorted(range(len(order)), key=lambda r: (abs(r - rank), r))
        match = next(int(order[r]) for r in nearest_ranks if int(order[r]) not in taken)
        taken.add(match)
        found.append(match)
    return found
