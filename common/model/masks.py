"""Who may see whom: every masking rule of the year, in one place.

Queries are the last T of S keys: with a cache, S is longer than T, and the causal triangle is aligned at its lower right
corner (gallery: attention/top-left-causal). True means "may see"; padding masks are the other way round, True at padding.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def causal_mask(queries: int, keys: int | None = None, *, device: torch.device | None = None) -> Bool[Tensor, "T S"]:
    """Query i stands at place S - T + i and sees the keys up to and including its own place. Raises ValueError if S < T.

    >>> causal_mask(2, 4).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    keys = queries if keys is None else keys
    if keys < queries:
        raise ValueError(f"{queries} queries are the last of the keys, but there are only {keys} keys")
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def document_starts(
    document_ids: Int[Tensor, "B S"], pad_mask: Bool[Tensor, "B S"] | None = None
) -> Bool[Tensor, "B S"]:
    """True at the first real token of each document: where the id differs from that of the real token before it.

    The ids at padding do not matter. An id that comes back after another one begins a new document.

    >>> document_starts(torch.tensor([[1, 1, 9, 1, 2]]), torch.tensor([[0, 0, 1, 0, 0]]).bool()).int().tolist()
    [[1, 0, 0, 0, 1]]
    """
    place = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    real = torch.ones_like(document_ids, dtype=torch.bool) if pad_mask is None else ~pad_mask
    here = torch.where(real, place, -1)
    before = torch.full_like(here, -1)
    before[:, 1:] = here.cummax(1).values[:, :-1]  # place of the last real token before this one
    previous = document_ids.gather(1, before.clamp(min=0))
    return real & ((before < 0) | (document_ids != previous))


def attention_mask(
    document_ids: Int[Tensor, "B S"] | None = None,
    *,
    pad_mask: Bool[Tensor, "B S"] | None = None,
    positions: Int[Tensor, "B S"] | None = None,
    window: int | None = None,
    prefix: Int[Tensor, "B"] | None = None,
    queries: int | None = None,
) -> Bool[Tensor, "B T S"]:
    """Every rule at once: a query sees no later key, no other document, no padding, and nothing beyond `window` tokens back.

    Args:
        document_ids: keep documents in one row apart. Restarting the positions alone would not.
        pad_mask: True at padding. Nothing sees it; a query that is padding sees nothing.
        positions: needed for `window` only, which counts tokens and not places, so that padding in between does not count.
        prefix: length of the bidirectional prefix of each row (prefix-LM). S makes the whole row bidirectional, as in an
            encoder.
        queries: T; the queries are the last T of the S tokens. All of them by default.

    >>> attention_mask(torch.tensor([[1, 1, 2]])).int().tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    given = [x for x in (document_ids, pad_mask, positions) if x is not None]
    if not given:
        raise ValueError("attention_mask needs document_ids, pad_mask or positions; causal_mask needs none")
    keys = given[0].shape[1]
    if prefix is not None and queries not in (None, keys):
        raise ValueError("a prefix that sees itself must come in one pass: its keys depend on tokens that come later")
    queries = keys if queries is None else queries
    mask = causal_mask(queries, keys, device=given[0].device)[None]
    if prefix is not None:
        mask = mask | (torch.arange(keys, device=mask.device) < prefix[:, None])[:, None, :]
    late = slice(keys - queries, None)  # not slice(-queries, None): for no queries that would be every place
    if document_ids is not None:
        number = document_starts(document_ids, pad_mask).cumsum(1)
        mask = mask & (number[:, late, None] == number[:, None, :])
    if pad_mask is not None:
        mask = mask & ~pad_mask[:, None, :] & ~pad_mask[:, late, None]
    if window is not None:
        if positions is None:
            raise ValueError("a window counts positions: give positions=")
        mask = mask & (positions[:, late, None] - positions[:, None, :] < window)
    return mask


def positions_of(
    document_ids: Int[Tensor, "B S"] | None, pad_mask: Bool[Tensor, "B S"] | None = None
) -> Int[Tensor, "B S"]:
    """Positions that count from 0 in each document and skip padding, on whichever side of the row the padding is.

    >>> positions_of(torch.tensor([[1, 1, 2, 2]])).tolist()
    [[0, 1, 0, 1]]
    >>> positions_of(None, torch.tensor([[True, True, False, False]])).tolist()
    [[0, 0, 0, 1]]
    """
    shape_of = pad_mask if document_ids is None else document_ids
    real = torch.ones_like(shape_of, dtype=torch.int64) if pad_mask is None else (~pad_mask).long()
    count = real.cumsum(1)  # real tokens up to and including here
    before = torch.zeros_like(count)
    if document_ids is not None:
        before = torch.where(document_starts(document_ids, pad_mask), count - real, 0).cummax(1).values
    return (count - before - 1).clamp(min=0)
