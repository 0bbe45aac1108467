"""bf16 on a processor that has no instructions for it: operands and results of matrix products are rounded, sums are fp32.

torch's own bf16 products work there, but fifty times slower than fp32. To see what the format does to a *training*, its
rounding is enough: within `rounded_products()` every product has operands and a result that bf16 can hold, forward and
backward, as under `torch.autocast`. What lies between two products (norms, activations, sums of the residual stream) stays
fp32, where autocast may keep bf16.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The products of the model, the loss and Muon, each with the number of leading arguments that are operands.
PRODUCTS = {
    F.linear: 2,
    torch.matmul: 2,
    Tensor.matmul: 2,
    Tensor.__matmul__: 2,
    F.scaled_dot_product_attention: 3,
}


class _Rounded(torch.autograd.Function):
    """Round to the nearest number that bf16 holds, and do the same to the gradient on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.bfloat16().float()


class rounded_products(TorchFunctionMode):
    """Within the block, fp32 products round as bf16 products with fp32 sums do."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operands = PRODUCTS.get(func, 0)
        if not operands:
            return func(*args, **(kwargs or {}))
        rounded = [_Rounded.apply(x) if x.dtype == torch.float32 else x for x in args[:operands]]
        return _Rounded.apply(func(*rounded, *args[operands:], **(kwargs or {})))
