"""Probes of what is done to a model after it was trained: identified by a fingerprint, and transformed for another use.

They know no library: a model is a callable or a module of torch, a transformation a function from module to module.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from common.diagnostics.core import Reading, probe
from common.diagnostics.probes.models import inputs, logits_of
from common.diagnostics.probes.training import some
from common.diagnostics.probes.weights import PARITY, apart


@probe("fingerprint-sees-every-weight", "does the fingerprint of a model change with each of its weights?")
def fingerprint_sees_every_weight(checkpoint: Mapping[str, Tensor], fingerprint_with: Callable) -> Reading:
    """Change one number of one tensor at a time. The same weights must give the same fingerprint twice.

    Results are kept and looked up by such a fingerprint: a weight that it does not see lets one model answer for another.
    """
    given = {name: tensor.detach().clone() for name, tensor in checkpoint.items()}
    right, unseen = fingerprint_with(dict(given)), []
    if fingerprint_with(dict(given)) != right:
        unseen.append("no two calls agree")
    for name, tensor in given.items():
        changed = tensor.flatten().clone()  # one number larger: by at least its size, so that no format rounds it away
        changed[-1] = changed[-1] + 1 + changed[-1].abs()
        if fingerprint_with({**given, name: changed.view(tensor.shape)}) == right:
            unseen.append(name)
    return Reading(float(len(unseen)), 0.0, f"of {len(given)} tensors not seen: {some(unseen)}")


@probe("adapter-survives-transformations", "is a model with an adapter still that model after it was transformed?")
def adapter_survives(
    adapted: nn.Module,
    transformations: Mapping[str, Callable],
    vocab_size: int,
    ids: Tensor | None = None,
    *,
    parity_tolerance: float = PARITY,
) -> Reading:
    """Prepacking, quantising without rounding, merging, saving and loading: each must give the same logits, or refuse.

    A fresh adapter is zero, and nobody would see it dropped. So what is trainable gets noise first, in a copy.
    """
    batch, _ = inputs(ids, vocab_size)
    trained, generator = copy.deepcopy(adapted), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    right = logits_of(trained, batch)
    if not apart(right, logits_of(adapted, batch)).max() > parity_tolerance:
        raise ValueError("nothing trainable changes the logits: is the adapter frozen, or not in use?")
    wrong, refused = [], []
    for name, transform in transformations.items():
        try:
            found = logits_of(transform(copy.deepcopy(trained)), batch)
        except ValueError:  # said, not dropped
            refused.append(name)
            continue
        if not apart(found, right).max() <= parity_tolerance:
            wrong.append(name)
    note = f"of {len(transformations)} give another model: {some(wrong)}; refuse: {some(refused)}"
    return Reading(float(len(wrong)), 0.0, note)
