"""The adapters of June's gallery, for tests: one wraps a linear module, as it should, and one subclasses it."""

import torch

from common.foundation.months import load
from common.model.surgery import replace_linears

gallery = load("06_baselines", "failures")
Low, Subclassed = gallery.LowRank, gallery.LowRankLinear


def adapted(model, *parts, make=Low, seed=0):
    """The model, frozen, with adapters on the linear modules whose name ends with one of the parts; none of them zero."""
    model.requires_grad_(False)
    names = replace_linears(model, lambda name, linear: make(linear), lambda name, _: name.endswith(parts))
    assert names
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        model.get_submodule(name).b.data.normal_(0, 0.3, generator=generator)
    return model
