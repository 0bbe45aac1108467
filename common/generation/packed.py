"""The same weights in the order in which a CPU wants to read them.

A step of decoding multiplies every matrix by one or a few rows: it costs what reading the weights costs. torch keeps a
matrix row by row. oneDNN, which does the multiplying, has an order of its own that suits the vector units, and rearranges
the matrix at each call unless it is given one that has been rearranged before. That is all this does; the numbers are those
of the unpacked model up to rounding (bench/june.py measures what it is worth).
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.model.transformer import Transformer

ROWS = 16  # the packed order is chosen for about so many rows at once; others are right, too


class PackedLinear(nn.Module):
    """x W^T + b with W packed. For inference: no gradients, not saved, CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack() -> bool:
    """Whether this torch has the two operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed(model: Transformer) -> Transformer:
    """A copy of a model on the CPU that decodes faster; the model itself where nothing can be packed (GPU, another torch,
    float64, packed already).

    Costs the memory of the matrices once more, and of a tied head. What is no matrix product (embeddings, norms, experts)
    is shared: when the model has been trained on, pack it again.
    """
    done = any(isinstance(m, PackedLinear) for m in model.modules())
    if done or not can_pack() or next(model.parameters()).device.type != "cpu":
        return model
    # Own parameters on the same storage: the copy asks for no gradient, the model still may.
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    made = copy.deepcopy(model, memo=shared).eval()
    for parent in list(made.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                try:
                    setattr(parent, name, PackedLinear(child))
                except RuntimeError:  # oneDNN does not have the number format, or not on this CPU
                    return model
    return made
