"""Small tasks with a known answer at every position: what a mechanism must do, and nothing else.

Each returns a Batch whose `loss_mask` admits the positions that can be predicted at all; elsewhere the next token is random.
"""

import torch

from common.data.documents import Batch


def _batch(ids: torch.Tensor, answerable: torch.Tensor) -> Batch:
    """Inputs and targets are neighbours in `ids` (B, T + 1); `answerable` (B, T + 1) marks tokens that can be predicted."""
    return Batch(ids[:, :-1], ids[:, 1:], answerable[:, 1:], torch.zeros_like(ids[:, :-1]))


def repeated(rows: int, length: int, vocab_size: int, seed: int) -> Batch:
    """Random tokens that begin again after a period, a different one in each row: from length / 4 to length / 2 tokens.

    From the second token of the repetition on, the next one can be looked up: find the last place where the present token
    stood, and copy what came after it. A fixed distance does not work, because the period varies.
    """
    generator = torch.Generator().manual_seed(seed)
    period = torch.randint(max(1, length // 4), length // 2 + 1, (rows, 1), generator=generator)
    place = torch.arange(length + 1).expand(rows, -1)
    once = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    return _batch(once.gather(1, place % period), place > period)


def previous(rows: int, length: int, vocab_size: int, seed: int, *, back: int = 1) -> Batch:
    """Random tokens; the target at t is the input at t - back. A matter of order alone: a bag of tokens does not help."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (rows, length), generator=generator)
    return Batch(ids, ids.roll(back, dims=1), (torch.arange(length) >= back).expand_as(ids), torch.zeros_like(ids))


def recall(rows: int, gap: int, vocab_size: int, seed: int, *, pairs: int = 4) -> Batch:
    """`pairs` of (key, value), then `gap` tokens of noise, then the same pairs in another order: each value is a target.

    Keys, values and noise come from three separate thirds of the vocabulary; the keys of a row differ.
    """
    generator = torch.Generator().manual_seed(seed)
    third = vocab_size // 3
    if pairs > third:
        raise ValueError(f"{pairs} different keys need a vocabulary of at least {3 * pairs}, got {vocab_size}")
    keys = torch.rand(rows, third, generator=generator).argsort(dim=1)[:, :pairs]
    values = third + torch.randint(third, (rows, pairs), generator=generator)
    noise = 2 * third + torch.randint(third, (rows, gap), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(dim=1)
    shown = torch.stack([keys, values], dim=2)  # (rows, pairs, 2)
    asked = shown.gather(1, order[..., None].expand_as(shown))
    ids = torch.cat([shown.flatten(1), noise, asked.flatten(1)], dim=1)
    place = torch.arange(ids.shape[1])
    return _batch(ids, ((place >= 2 * pairs + gap) & ((place - gap) % 2 == 1)).expand_as(ids))
