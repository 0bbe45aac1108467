"""Probes of a sampler: `generate(prompts, seed)` returns one text for each prompt."""

from collections import Counter
from collections.abc import Callable

from common.diagnostics.core import Reading, probe


def _prompts(heldout_texts: list[str], count: int = 8) -> list[str]:
    return [text[: 5 + i % 4] for i, text in enumerate(heldout_texts[:count])]


@probe("samples-look-right", "do samples use the letters of the training text in about its proportions?")
def samples_look_right(
    generate: Callable, heldout_texts: list[str], train_texts: list[str], *, tolerance: float = 0.25
) -> Reading:
    """Reading samples, as a number: total variation distance between letter frequencies. Few bugs show in it."""
    made = Counter("".join(generate(_prompts(heldout_texts) * 4, 0)))
    real = Counter("".join(train_texts))
    letters = set(made) | set(real)
    distance = sum(abs(made[c] / max(1, made.total()) - real[c] / real.total()) for c in letters) / 2
    return Reading(distance, tolerance, "total variation distance of letter frequencies")


@probe("seed-determinism", "does the same seed give the same samples, and another seed others?")
def seed_determinism(generate: Callable, heldout_texts: list[str]) -> Reading:
    """Share of prompts that break the contract: changed under the same seed, or all unchanged under another."""
    prompts = _prompts(heldout_texts)
    first, again, other = generate(prompts, 7), generate(prompts, 7), generate(prompts, 8)
    changed = sum(a != b for a, b in zip(first, again, strict=True)) / len(prompts)
    return Reading(changed + float(first == other), 0.0, "share of samples that changed under the same seed")


@probe("batch-independence", "does a sample depend on what else is in the batch?")
def batch_independence(generate: Callable, heldout_texts: list[str]) -> Reading:
    """Generate for all prompts, then for the first half with others after it: the first half must not change."""
    prompts = _prompts(heldout_texts)
    half = len(prompts) // 2
    alone = [generate(prompts[: i + 1], 7)[i] for i in range(half)]
    together = generate(prompts[:half] + prompts[::-1], 7)[:half]
    changed = sum(a != b for a, b in zip(alone, together, strict=True)) / half
    return Reading(changed, 0.0, "share of samples that changed with their neighbours")


@probe("distinct-samples", "are many samples of one prompt different from each other?")
def distinct_samples(
    generate: Callable, heldout_texts: list[str], *, count: int = 16, tolerance: float = 0.5
) -> Reading:
    """Share of duplicates among samples of the same prompt. A shared random state makes them all equal."""
    samples = generate([heldout_texts[0][:8]] * count, 7)
    return Reading(1 - len(set(samples)) / count, tolerance, "share of duplicates")
