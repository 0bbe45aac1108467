"""Log-probabilities of given tokens: one definition for sampling, for scoring and for losses that need them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_logprobs(
    logits: Float[Tensor, "... V"], ids: Int[Tensor, "..."], *, vocab_size: int, temperature: float = 1.0
) -> Float[Tensor, "..."]:
    """The natural logarithm of the probability of each of `ids`, in double precision.

    Args:
        logits: (..., V), one row of scores for each id.
        ids: (...), the tokens whose probabilities are asked for.
        vocab_size: how many tokens the tokenizer has. A head is often padded to a round number of rows (Qwen3: 151,936
            rows for 151,669 tokens). The rows beyond `vocab_size` are no tokens and can never be drawn, so they are cut off
            before the softmax: otherwise they would take probability from the real tokens.
        temperature: divides the logits; 1 is the model as it was trained.
    Raises:
        ValueError: the temperature is not positive (greedy decoding has no log-probabilities).
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: a log-probability needs a temperature above 0")
    scores = logits[..., :vocab_size].double()
    if temperature != 1:
        scores = scores / temperature
    return torch.log_softmax(scores, dim=-1).gather(-1, ids[..., None]).squeeze(-1)
