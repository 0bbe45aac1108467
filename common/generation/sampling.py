"""From logits to a token: one definition of temperature, top-k, top-p and min-p, and one source of randomness.

Randomness is an input, not a side effect: each row brings a number in [0, 1), which is looked up in the cumulative
distribution. A row's token therefore depends on its own logits and its own number, never on its neighbours in the batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature=0` is greedy, exactly. Order: temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divides the logits before the softmax; 0 takes the first maximum.
        top_k: keep the k most probable tokens, exactly k; on a tie the smaller id stays. None keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities reach top_p (Holtzman et al. 2019).
        min_p: drop tokens below min_p times the largest probability.
        max_tokens: stop after this many tokens behind the prompt; forced tokens count.
        stop: stop when the generated text (never the prompt) contains one of these; the text is cut off before it.
        n: how many samples of each prompt.
        seed: sample k of prompt i depends on (seed, i, k) alone.
        logprobs: fill `Completion.logprobs` (of the model, at temperature 1 and without filters, as `Engine.score` computes
            them) and `Completion.sampled_logprobs` (of the distribution that was drawn from).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    n: int = 1
    seed: int = 0
    logprobs: bool = False

    @property
    def distribution(self) -> tuple[float, int | None, float, float]:
        """The fields that decide what is drawn from; rows that agree in them can be drawn together."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of texts, none of them empty"),
            "n": (self.n >= 1, "at least 1"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        for name, (holds, need) in rules.items():
            if not holds:
                raise ValueError(f"SamplingParams.{name} = {getattr(self, name)!r}: must be {need}")


def probabilities(logits: Float[Tensor, "B V"], params: SamplingParams) -> Float[Tensor, "B V"]:
    """The distribution that is sampled from, in double precision. Greedy puts everything on the first maximum."""
    if params.temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    p = torch.softmax(logits.double() / params.temperature, dim=1)  # (B, V)
    if params.top_k is not None or params.top_p < 1:
        # A stable sort makes ties a rule (smaller id first) instead of an accident.
        ranked, order = torch.sort(p, dim=1, descending=True, stable=True)
        keep = torch.ones_like(ranked, dtype=torch.bool)
        if params.top_k is not None:
            keep[:, params.top_k :] = False
        if params.top_p < 1:
            kept = ranked * keep
            kept = kept / kept.sum(dim=1, keepdim=True)
            before = kept.cumsum(dim=1) - kept  # the mass of everything more probable
            keep &= before < params.top_p
        p = torch.zeros_like(p).scatter_(1, order, ranked * keep)
    if params.min_p > 0:
        p = torch.where(p >= params.min_p * p.amax(dim=1, keepdim=True), p, 0.0)
    return p / p.sum(dim=1, keepdim=True)


def sample(
    logits: Float[Tensor, "B V"], params: SamplingParams, uniforms: Float[Tensor, "B"]
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"] | None]:
    """Draw one token for each row.

    The token is the first whose cumulative probability exceeds the row's number in [0, 1).

    Returns:
        (ids, logprobs): the tokens; and if `params.logprobs`, else None, the natural logarithm of the probability with which
        each was drawn, after temperature and filters. A greedy token is certain: 0.
    """
    if params.temperature == 0:
        ids = logits.argmax(dim=1)
        return ids, torch.zeros(len(ids), dtype=torch.float64) if params.logprobs else None
    p = probabilities(logits, params)
    cumulative = p.cumsum(dim=1)
    total = cumulative[:, -1:]
    # A number that rounded up to 1 must not fall off the end, onto a token of probability zero.
    target = torch.minimum(uniforms.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, target, right=True)  # (B, 1)
    return ids.squeeze(1), p.gather(1, ids).squeeze(1).log() if params.logprobs else None


def uniform_numbers(seed: int, index: int, sample_index: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for one sample of one prompt, one for each position after the prompt.

    A longer draw begins with the shorter one, so `max_tokens` does not change the text.
    """
    return np.random.default_rng((seed, index, sample_index)).random(count)
