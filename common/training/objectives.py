"""What is predicted from what: next token, masked tokens, or the rest after a prefix. One model, three objectives.

An objective turns a batch of the stream into the batch that is trained on; `loss_of` turns a model's answer to it into a
loss. Both count targets with `loss_mask`, so that every trainer, log and evaluator sees the same unit: nats per target.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from common.data.documents import Batch
from common.training.distributed import inner, is_sharded
from common.training.loss import Loss, chunked_language_model_loss, language_model_loss


class Prepared(NamedTuple):
    """A batch as an objective wants it. `prefix` as in Transformer.forward; None is causal."""

    batch: Batch
    prefix: Int[Tensor, "B"] | None = None


class Objective(Protocol):
    """`number` is that of the batch in the training: randomness depends on it, so that a resumed run repeats it."""

    def prepare(self, batch: Batch, number: int) -> Prepared: ...


def several_documents(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"] | None:
    """The ids, or None where every row is one document: then no mask is needed beyond the causal one."""
    return document_ids if (document_ids != document_ids[:, :1]).any() else None


@dataclass(frozen=True)
class NextToken:
    """Every token from those before it. The stream's own targets; nothing is wasted and nothing is hidden."""

    def prepare(self, batch: Batch, number: int) -> Prepared:
        return Prepared(batch)


@dataclass(frozen=True)
class Prefix:
    """The tokens after a cut, from all before them; those before the cut see each other in both directions.

    UniLM (Dong et al. 2019) and T5's "prefix LM" (Raffel et al. 2019, section 3.2.1). Cuts are uniform in each row.
    """

    seed: int = 0

    def prepare(self, batch: Batch, number: int) -> Prepared:
        rows, length = batch.inputs.shape
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        cut = torch.randint(1, length, (rows,), generator=generator)
        # The last place of the prefix predicts the first token after it; those before have already seen their targets.
        late = torch.arange(length) >= cut[:, None] - 1
        return Prepared(replace(batch, loss_mask=batch.loss_mask & late), cut)


@dataclass(frozen=True)
class Masked:
    """Some tokens from all others, on both sides: BERT (Devlin et al. 2018, section 3.1) without its sentence task.

    Of the chosen 15 %, 80 % become `mask_id`, 10 % another token, 10 % stay. Targets are the tokens themselves, at their own
    places: nothing is shifted here.

    Attributes:
        mask_id: a token that stands nowhere else.
        vocab_size: for the random ones.
    """

    mask_id: int
    vocab_size: int
    share: float = 0.15
    seed: int = 0

    def prepare(self, batch: Batch, number: int) -> Prepared:
        rows, length = batch.inputs.shape
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        chosen = (torch.rand(rows, length, generator=generator) < self.share) & (batch.document_ids >= 0)
        fate = torch.rand(rows, length, generator=generator)
        other = torch.randint(self.vocab_size, (rows, length), generator=generator)
        changed = torch.where(fate < 0.8, self.mask_id, torch.where(fate < 0.9, other, batch.inputs))
        inputs = torch.where(chosen, changed, batch.inputs)
        whole = torch.full((rows,), length)
        return Prepared(replace(batch, inputs=inputs, targets=batch.inputs, loss_mask=chosen), whole)


def loss_of(model: nn.Module, prepared: Prepared) -> tuple[Loss, Tensor | float]:
    """(loss, penalty) of a model on a prepared batch: the chunked form where the model can leave its head to it."""
    batch, options = prepared.batch, {}
    if prepared.prefix is not None:
        options["prefix"] = prepared.prefix
    documents = several_documents(batch.document_ids)
    bare = inner(model)
    config = getattr(bare, "config", None)
    if config is None or config.z_loss or is_sharded(model):  # a sharded head lives only within its forward
        out = model(batch.inputs, document_ids=documents, **options)
        return language_model_loss(out.logits, batch.targets, batch.loss_mask), (out.aux or {}).get("penalty", 0.0)
    out = model(batch.inputs, document_ids=documents, head=False, **options)
    weight, cap = bare.head.weight, config.logit_softcap
    loss = chunked_language_model_loss(out.hidden[-1], weight, batch.targets, batch.loss_mask, softcap=cap)
    return loss, out.aux["penalty"]
