"""The one interface of every language model of the year."""

from typing import Any, NamedTuple, Protocol

from jaxtyping import Bool, Float, Int
from torch import Tensor


class Output(NamedTuple):
    """What a forward pass returns: the logits, and whatever else the caller asked for."""

    logits: Float[Tensor, "B T V"]
    hidden: Any = None
    aux: Any = None


class LanguageModel(Protocol):
    """Ids in, logits out. Position t of the output scores token t + 1 and depends on tokens up to t alone.

    Attributes:
        vocab_size: V.
        context_length: how many tokens back an output can depend on; a longer input is allowed where the model says so.
        bounded: True where an output never depends on more than the last `context_length` tokens, however long the input
            is (n-grams): longer inputs are safe. False where it may (a transformer, a recurrent network): show it at most
            `context_length` tokens at once. A model without the attribute counts as bounded.
    """

    vocab_size: int
    context_length: int
    bounded: bool

    def __call__(
        self,
        ids: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        pad_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Output:
        """`document_ids`: a token sees only its own document. `pad_mask`: True at padding, which nothing sees."""
        ...


def is_bounded(model: LanguageModel) -> bool:
    """`model.bounded`, True where it is missing."""
    return getattr(model, "bounded", True)
