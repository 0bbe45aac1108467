"""Normalisation: the formula to read, and the fused form that runs.

LayerNorm (Ba et al. 2016) subtracts the mean and divides by the standard deviation; RMSNorm (Zhang and Sennrich 2019)
only divides by the root mean square. Statistics are computed in fp32 whatever the format of the input.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def layer_norm(
    x: Float[Tensor, "... C"], weight: Tensor, bias: Tensor | None, epsilon: float
) -> Float[Tensor, "... C"]:
    """The formula. The variance is the biased one, divided by C (gallery: blocks/unbiased-variance)."""
    x32 = x.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon)
    scaled = normed * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)


def rms_norm(x: Float[Tensor, "... C"], weight: Tensor, epsilon: float) -> Float[Tensor, "... C"]:
    """The formula: x / sqrt(mean(x^2) + epsilon) * weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + epsilon) * weight).to(x.dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The format in which `torch.autocast` computes products of this tensor now; None outside of it."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


class Norm(nn.Module):
    """Either norm over the last dimension, with torch's fused kernel: equal to the formula and several times faster.

    LayerNorm has a bias and RMSNorm has none, as in every published model of the year.
    """

    def __init__(self, kind: str, width: int, epsilon: float) -> None:
        super().__init__()
        self.kind, self.epsilon = kind, epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        if self.kind == "layer":
            normed = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
        else:
            normed = F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        narrow = autocast_dtype(x)  # once, here: autocast would cast again for each product that follows
        return normed if narrow is None else normed.to(narrow)
