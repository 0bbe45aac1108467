"""What is learned from a batch, and in which unit: next token, masked tokens, or the rest after a prefix.

An objective does three things. It names the `unit` that its loss is a mean over; it turns a batch of the stream into what
one micro-batch is trained on (`prepare`); and it computes the loss of a model on that (`loss`). The trainer knows nothing
else about the loss, so a loss over rows, pairs or sequences is one more class with these three members, in whatever room it
is needed.

The objectives of this file predict tokens and share one loss: the negative log-likelihood of the targets that `loss_mask`
admits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.data.documents import Batch
from common.model.transformer import Transformer
from common.training.distributed import inner, is_sharded
from common.training.loss import chunked_language_model_loss, language_model_loss

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Terms(NamedTuple):
    """What an objective returns for one micro-batch. The trainer divides by the units of the whole update, not of this part.

    Attributes:
        sum: the loss, summed over the units of this micro-batch.
        count: how many units these are; equal to `units` of what was prepared.
        penalty: a mean that is added to the loss in training and not reported, such as a router's balance loss.
        logged: other quantities to report, each summed over the units like `sum` (log a reward margin as the sum of the
            margins). The trainer divides them by the units and writes them into its history under these names. The names
            must be the same for every micro-batch, because processes add them up together.
    """

    sum: Float[Tensor, ""]
    count: Int[Tensor, ""] | int
    penalty: Float[Tensor, ""] | float = 0.0
    logged: Mapping[str, Tensor | float] = NOTHING

    @property
    def mean(self) -> Float[Tensor, ""]:
        """`sum / count`, and zero where nothing counts."""
        return self.sum / max(1, int(self.count))


class Prepared(Protocol):
    """What one micro-batch is trained on.

    Attributes:
        units: the number of units that the loss is a mean over.
    """

    @property
    def units(self) -> Int[Tensor, ""] | int: ...

    def to(self, device: torch.device) -> Self: ...


class Objective(Protocol):
    """How a batch of the stream becomes a loss.

    An objective has no memory: a resumed training builds it anew, so both methods are functions of their arguments. A
    teacher or a reference model is a frozen field.

    Attributes:
        unit: what the loss is a mean over, in the singular: "target", "row", "pair", "sequence".
    """

    unit: str

    def prepare(self, batch: Any, number: int) -> Prepared:
        """What is trained on.

        Args:
            batch: what the stream returned.
            number: the index of this batch since the start of the training, over all processes. Seed any randomness with
                it, so that a resumed training draws the same.
        """
        ...

    def loss(self, model: nn.Module, prepared: Any) -> Terms:
        """The loss of `model`, which must be called as it is passed: a wrapper around it exchanges the gradients."""
        ...


@dataclass(frozen=True)
class PreparedTokens:
    """A batch in which tokens are predicted.

    Attributes:
        prefix: as in Transformer.forward; None is causal.
    """

    batch: Batch
    prefix: Int[Tensor, "B"] | None = None

    @property
    def units(self) -> Int[Tensor, ""]:
        """Targets that count."""
        return self.batch.loss_mask.sum()

    def to(self, device: torch.device) -> "PreparedTokens":
        """The same on another device."""
        if device.type == "cpu":
            return self
        prefix = None if self.prefix is None else self.prefix.to(device, non_blocking=True)
        return PreparedTokens(self.batch.to(device), prefix)


def several_documents(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"] | None:
    """The ids, or None where every row is one document: then no mask is needed beyond the causal one."""
    return document_ids if (document_ids != document_ids[:, :1]).any() else None


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output layer, if the loss may compute with its weight in place of calling it; None where it must be called.

    Reading a weight behind a module's back is right only if the module does nothing but multiply with it. An adapter around
    the head, a parametrisation, a hook, a bias, or a method that replaces `forward` would silently be left out.
    """
    bare = inner(model)
    if not isinstance(bare, Transformer) or type(bare).logits_of is not Transformer.logits_of:
        return None
    # The penalty of z_loss needs whole logits. A sharded weight is whole only while the model's forward pass runs.
    if bare.config.z_loss or is_sharded(model):
        return None
    head = bare.head
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    # The exact type: torch's parametrisations make a subclass, and so do many implementations of adapters.
    plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head) and not any(hooks)
    return head if plain else None


class TokenObjective:
    """The loss that all predictions of tokens share. Subclasses choose inputs, targets and `loss_mask`."""

    unit: ClassVar[str] = "target"

    def loss(self, model: nn.Module, prepared: PreparedTokens) -> Terms:
        """Nats of the targets that count; without whole logits (`chunked_language_model_loss`) where the head is plain."""
        batch = prepared.batch
        options = {} if prepared.prefix is None else {"prefix": prepared.prefix}
        documents, head = several_documents(batch.document_ids), plain_head(model)
        if head is None:
            out = model(batch.inputs, document_ids=documents, **options)
            nats = language_model_loss(out.logits, batch.targets, batch.loss_mask)
            return Terms(nats.sum, nats.count, (out.aux or {}).get("penalty", 0.0))
        out = model(batch.inputs, document_ids=documents, head=False, **options)
        nats = chunked_language_model_loss(
            out.hidden[-1], head.weight, batch.targets, batch.loss_mask, softcap=inner(model).config.logit_softcap
        )
        return Terms(nats.sum, nats.count, out.aux["penalty"])


@dataclass(frozen=True)
class NextToken(TokenObjective):
    """Every token is predicted from those before it. The stream's own targets; nothing is wasted and nothing is hidden."""

    def prepare(self, batch: Batch, number: int) -> PreparedTokens:
        return PreparedTokens(batch)


@dataclass(frozen=True)
class Prefix(TokenObjective):
    """The tokens after a cut are predicted from all before them; those before the cut see each other in both directions.

    UniLM (Dong et al. 2019) and T5's "prefix LM" (Raffel et al. 2019, section 3.2.1). Each row draws its cut uniformly.
    """

    seed: int = 0

    def prepare(self, batch: Batch, number: int) -> PreparedTokens:
        rows, length = batch.inputs.shape
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        cut = torch.randint(1, length, (rows,), generator=generator)
        # The last place of the prefix predicts the first token after it; those before have already seen their targets.
        late = torch.arange(length) >= cut[:, None] - 1
        return PreparedTokens(replace(batch, loss_mask=batch.loss_mask & late), cut)


@dataclass(frozen=True)
class Masked(TokenObjective):
    """Some tokens are predicted from all others, on both sides: BERT (Devlin et al. 2018, section 3.1), one sentence a row.

    Of the chosen 15 %, 80 % become `mask_id`, 10 % become another token and 10 % stay as they are. Targets are the tokens
    themselves, at their own places: nothing is shifted here.

    Attributes:
        mask_id: a token that stands nowhere else.
        vocab_size: the range from which the random tokens are drawn.
    """

    mask_id: int
    vocab_size: int
    share: float = 0.15
    seed: int = 0

    def prepare(self, batch: Batch, number: int) -> PreparedTokens:
        rows, length = batch.inputs.shape
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        chosen = (torch.rand(rows, length, generator=generator) < self.share) & (batch.document_ids >= 0)
        fate = torch.rand(rows, length, generator=generator)
        other = torch.randint(self.vocab_size, (rows, length), generator=generator)
        changed = torch.where(fate < 0.8, self.mask_id, torch.where(fate < 0.9, other, batch.inputs))
        inputs = torch.where(chosen, changed, batch.inputs)
        whole = torch.full((rows,), length)
        return PreparedTokens(replace(batch, inputs=inputs, targets=batch.inputs, loss_mask=chosen), whole)
