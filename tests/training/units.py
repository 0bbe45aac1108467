"""Three objectives whose unit is no target: labels of rows, preferences between pairs, a teacher's word on sequences.

They live here and not in the product: they show that a loss of another kind needs nothing of the trainer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.documents import Batch
from common.model.transformer import Transformer
from common.training.loss import token_nats
from common.training.objectives import Terms
from tests.training.tiny import CONFIG, LENGTH, Ragged, V, stream_of

REFERENCE = Transformer(CONFIG, seed=1).requires_grad_(False).eval()
TEACHER = Transformer(CONFIG.but(layers=1, init_std=0.3), seed=7).requires_grad_(False).eval()


@dataclass(frozen=True)
class Moved:
    """What all three prepare: values, of which `units` are the number that count."""

    values: dict[str, Any]
    units: Tensor | int

    def to(self, device):
        moved = {name: value.to(device) for name, value in self.values.items()}
        return Moved(moved, self.units)


class Labels:
    """Is the last token of a row even? A third of the rows have no label."""

    unit = "row"

    def prepare(self, batch, number):
        labelled = batch.inputs.sum(1) % 3 > 0
        values = {"inputs": batch.inputs, "labels": batch.inputs[:, -1] % 2, "labelled": labelled}
        return Moved(values, int(labelled.sum()))  # a plain number is enough

    def loss(self, model, prepared):
        inputs, labels, labelled = prepared.values.values()
        logits = model(inputs).logits[:, -1, :2]
        nats = F.cross_entropy(logits, labels, reduction="none")
        right = (logits.argmax(1) == labels) & labelled
        return Terms((nats * labelled).sum(), labelled.sum(), logged={"accuracy": right.sum()})


class Preference:
    """DPO (Rafailov et al. 2023, equation 7). Ties are in the data and do not count."""

    unit, beta = "pair", 0.5

    def prepare(self, batch, number):
        chosen, rejected, tied = batch
        values = {"chosen": chosen, "rejected": rejected, "tied": tied}
        return Moved(values, (~tied).sum())

    def loss(self, model, prepared):
        chosen, rejected, tied = prepared.values.values()
        ours = score(model, chosen) - score(model, rejected)
        with torch.no_grad():
            theirs = score(REFERENCE, chosen) - score(REFERENCE, rejected)
        margin = self.beta * (ours - theirs)
        logged = {"margin": (margin * ~tied).sum(), "won": ((margin > 0) & ~tied).sum()}
        return Terms((-F.logsigmoid(margin) * ~tied).sum(), (~tied).sum(), logged=logged)


def score(model, batch):
    """(B,) log-probability of the targets that count."""
    nats = token_nats(model(batch.inputs).logits, batch.targets)
    return -(nats * batch.loss_mask).sum(1)


class Pairs:
    """A stream of another kind of batch: pairs of rows that go on by ones and by twos, from the same beginning."""

    epoch = 0

    def __init__(self, batch_size):
        self.batch_size, self.number = batch_size, 0

    def next_batch(self):
        rows = [self.pair(self.number + i) for i in range(self.batch_size)]
        self.number += self.batch_size
        tied = torch.tensor([rejected is None for _, rejected in rows])
        chosen = [chosen for chosen, _ in rows]
        rejected = [chosen if rejected is None else rejected for chosen, rejected in rows]
        mask = (torch.arange(LENGTH) >= 2).expand(self.batch_size, LENGTH)  # the first three tokens are the question
        made = []
        for side in (chosen, rejected):
            ids = torch.tensor(np.stack(side))
            made.append(Batch(ids[:, :-1], ids[:, 1:], mask, torch.zeros_like(ids[:, 1:])))
        return (*made, tied)

    def pair(self, number):
        """(chosen, rejected); None is a tie."""
        rng = np.random.default_rng(number)
        ids = rng.integers(1, V, LENGTH + 1)
        chosen, rejected = ids.copy(), ids.copy()
        for place in range(3, LENGTH + 1):
            chosen[place], rejected[place] = (1 + (side[place - 1] + step) % (V - 1) for side, step in
                                              ((chosen, 0), (rejected, 1)))  # fmt: skip
        return chosen, rejected if rng.random() < 0.7 else None

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Distilled:
    """KL divergence from the teacher at temperature 2, the mean over each sequence's targets (Hinton et al. 2015)."""

    unit, temperature = "sequence", 2.0

    def prepare(self, batch, number):
        batch = Ragged().prepare(batch, number).batch
        with torch.no_grad():
            teacher = (TEACHER(batch.inputs).logits / self.temperature).log_softmax(-1)
        values = {"inputs": batch.inputs, "mask": batch.loss_mask, "teacher": teacher}
        return Moved(values, batch.loss_mask.any(1).sum())

    def loss(self, model, prepared):
        inputs, mask, teacher = prepared.values.values()
        student = (model(inputs).logits / self.temperature).log_softmax(-1)
        each = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        whole = ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).sum()
        entropy = (-(student.exp() * student).sum(-1) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return Terms(whole * self.temperature**2, mask.any(1).sum(), logged={"entropy": entropy.sum()})


UNITS = {  # name -> (objective, a stream with that many rows or pairs in a batch, what it logs)
    "labels": (Labels, lambda rows: stream_of(rows, seed=2), ("accuracy",)),
    "preference": (Preference, Pairs, ("margin", "won")),
    "distilled": (Distilled, lambda rows: stream_of(rows, seed=2), ("entropy",)),
}
