"""What goes into an engine and what comes out of it: prompts, completions, scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.tokenization.chat import Message

# What is asked: a text, or a conversation that the engine's chat template renders.
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
        ids: every token after the prompt, including the end-of-text token or the tokens of the stop text that ended it.
        text: the text before that end.
        logprobs: natural log-probability of each of `ids` under the model itself: at temperature 1, without filters, over
            the tokenizer's vocabulary. None if `SamplingParams.logprobs` is off.
        finish_reason: "end_of_text", "stop" or "length".
        prompt_tokens: length of the prompt in tokens.
        seconds: this row's share of the wall time of its batch.
        sampled_logprobs: natural log-probability of each of `ids` under the distribution it was drawn from (temperature,
            top-k, top-p, min-p). 0 for greedy and for forced tokens, which were certain. None if `logprobs` is off.
        forced: for each of `ids`, True if it was given and not drawn. None if nothing was forced.
    """

    ids: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: str
    prompt_tokens: int
    seconds: float
    sampled_logprobs: list[float] | None = None
    forced: list[bool] | None = None


@dataclass(frozen=True)
class TokenScores:
    """Natural log-probabilities of the tokens of one continuation, given its prompt."""

    logprobs: list[float]

    @property
    def sum(self) -> float:
        return float(np.sum(self.logprobs))
