"""The weights of a model in the order in which a CPU wants to read them.

One step of decoding multiplies every matrix with one or a few rows, so it takes as long as reading the weights. torch
stores a matrix row by row. oneDNN, the library that does the multiplying, has a layout of its own that suits the vector
units, and rearranges the matrix at each call unless it is given one that was rearranged before. Rearranging it once is all
that happens here: the results are those of the plain model up to rounding (bench/june.py measures the gain).
"""

import copy
import hashlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.model.latent import LatentAttention
from common.model.surgery import replace_linears
from common.model.transformer import Transformer

ROWS = 16  # batch size that the layout is tuned for; results are the same for any batch size


class PrepackedLinear(nn.Module):
    """x W^T + b with W in oneDNN's layout. For inference on a CPU: it has no gradients, and a checkpoint cannot hold it.

    Its state_dict has the bias and `weight_digest`, the SHA-256 of the weight, in place of the weight itself. So a
    fingerprint of the model depends on every weight (gallery: baselines/blind-fingerprint), and no weight is kept twice.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.weight_in_layout = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self._digest: Tensor | None = None

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight_in_layout, self.bias, "none", [], "")

    @property
    def weight_digest(self) -> Tensor:
        """SHA-256 of the plain weight, 32 bytes. Computed when it is first asked for: most models never are."""
        if self._digest is None:  # the weight cannot change any more, so the digest stays right
            plain = self.weight_in_layout.to_dense().contiguous().flatten().view(torch.uint8)
            self._digest = torch.frombuffer(bytearray(hashlib.sha256(plain.numpy()).digest()), dtype=torch.uint8)
        return self._digest

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight_digest"] = self.weight_digest


def can_prepack() -> bool:
    """Whether this torch has the two operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def prepacked(model: Transformer) -> Transformer:
    """A copy of the model for decoding on a CPU: every linear module becomes a PrepackedLinear, but one.

    The exception is the `up` matrix of latent attention, whose rows are needed one head at a time while decoding. The
    matrices take memory a second time, a tied head included. Everything that is no matrix product (embeddings, norms,
    experts) is shared with the model. After further training, prepack the model again.

    Returns the model itself where nothing can be prepacked: on a GPU, in float64, with another torch, or if it is
    prepacked.

    Raises:
        ValueError: a module is a subclass of `nn.Linear` with parameters of its own; see `replace_linears`.
    """
    done = any(isinstance(m, PrepackedLinear) for m in model.modules())
    if done or not can_prepack() or next(model.parameters()).device.type != "cpu":
        return model
    # New Parameters over the same storage, so that `requires_grad=False` here does not freeze the original.
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    made = copy.deepcopy(model, memo=shared).eval()
    needed_plain = {id(m.up) for m in made.modules() if isinstance(m, LatentAttention)}
    try:
        # A tied head becomes a matrix of its own: the embedding needs rows that can be looked up one by one.
        replace_linears(
            made,
            lambda name, linear: PrepackedLinear(linear),
            where=lambda name, linear: id(linear) not in needed_plain,
            tied="replace",
        )
    except RuntimeError:  # oneDNN does not have this number format, or not on this CPU
        return model
    return made
