"""Probes of an engine: what samples, scores and remembers, around a model that also trains.

They know no library: an engine is a few callables from ids to ids or numbers. The model behind it is an `nn.Module` that
the probe puts into training mode, or changes as an optimizer would, and leaves as it was.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from common.diagnostics.core import Reading, probe

NATS = 1e-3  # two right computations of one log-probability differ by 1e-5 in float32


def _prompts(makeable_ids: Collection[int], lengths: Sequence[int] = (1, 7, 3, 5)) -> list[list[int]]:
    """Prompts of different lengths, so that a batch of them needs padding."""
    ids = sorted(makeable_ids)
    generator = torch.Generator().manual_seed(0)
    return [[ids[i] for i in torch.randint(len(ids), (length,), generator=generator)] for length in lengths]


@probe("generate-equals-score", "is a token as probable when it is scored as when it was generated?")
def generate_equals_score(
    generated_logprobs: Callable, score_tokens: Callable, makeable_ids: Collection[int], *, tolerance: float = NATS
) -> Reading:
    """Generate after four prompts, then score the same ids after the same prompts: the numbers must agree.

    A ratio of new to old policy starts at exp of this difference instead of at 1.
    """
    prompts = _prompts(makeable_ids)
    made = generated_logprobs(prompts, 7)
    scored = score_tokens(prompts, [ids for ids, _ in made])
    gaps = [abs(a - b) for (_, one), two in zip(made, scored, strict=True) for a, b in zip(one, two, strict=True)]
    if not gaps:
        raise ValueError("nothing was generated, so nothing can be compared")
    worst = max(gaps, key=lambda gap: gap if gap == gap else float("inf"))  # NaN is the worst of all
    return Reading(worst, tolerance, f"largest difference in nats over {len(gaps)} tokens")


@probe("mode-independence", "does the engine write the same while its model is being trained?")
def mode_independence(
    greedy: Callable, module: nn.Module, makeable_ids: Collection[int], *, count: int = 12
) -> Reading:
    """Greedy text with the module in evaluation mode, and twice in training mode, as after an update: it must not change.

    Afterwards every part of the module must be in the mode it was in, or the training goes on without its dropout.
    """
    before = {part: part.training for part in module.modules()}
    wrong = forgotten = 0
    try:
        for prompt in _prompts(makeable_ids):
            module.eval()
            expected = greedy(prompt, count)
            module.train()
            wrong += any(greedy(prompt, count) != expected for _ in range(2))
            forgotten += not all(part.training for part in module.modules())
    finally:
        for part, mode in before.items():
            part.training = mode
    return Reading(float(wrong + forgotten), 0.0, f"of 4 prompts: {wrong} other texts, {forgotten} modes not restored")


@probe("no-stale-cache", "is anything remembered of weights that have changed since?")
def no_stale_cache(
    remembering: Callable, module: nn.Module, makeable_ids: Collection[int], *, count: int = 12, step: float = 1.0
) -> Reading:
    """Ask, change every parameter in place as an optimizer does, and ask on: the answer must be a fresh engine's.

    `step` is the size of the change, in deviations of each parameter. The parameters are put back afterwards.
    """
    saved = [parameter.detach().clone() for parameter in module.parameters()]
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    try:
        for first, more in zip(_prompts(makeable_ids, (9, 12, 15)), _prompts(makeable_ids, (2, 3, 1)), strict=True):
            engine = remembering()
            asked = [*first, *engine(first, count), *more]
            with torch.no_grad():
                for parameter, before in zip(module.parameters(), saved, strict=True):
                    noise = torch.randn(before.shape, generator=generator).to(before)
                    parameter.copy_(before + step * noise * before.std(correction=0))
            wrong += engine(asked, count) != remembering()(asked, count)
    finally:
        with torch.no_grad():
            for parameter, before in zip(module.parameters(), saved, strict=True):
                parameter.copy_(before)
    return Reading(float(wrong), 0.0, "of 3 conversations that went on otherwise than a fresh engine's")
