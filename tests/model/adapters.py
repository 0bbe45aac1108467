"""The smallest low-rank adapters for tests: one that wraps a linear module, as it should, and one that subclasses it."""

import torch
from torch import nn

from common.model.surgery import replace_linears


class Low(nn.Module):
    """x W^T + (x A^T) B^T: wraps."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.base = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features, generator=torch.Generator().manual_seed(5)))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class Subclassed(nn.Linear):
    """The same, as a linear module with two more parameters."""

    def __init__(self, linear, rank=2):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.a = nn.Parameter(torch.randn(rank, linear.in_features, generator=torch.Generator().manual_seed(5)))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


def adapted(model, *parts, make=Low, seed=0):
    """The model, frozen, with adapters on the linear modules whose name ends with one of the parts; none of them zero."""
    model.requires_grad_(False)
    names = replace_linears(model, lambda name, linear: make(linear), lambda name, _: name.endswith(parts))
    assert names
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        model.get_submodule(name).b.data.normal_(0, 0.3, generator=generator)
    return model
