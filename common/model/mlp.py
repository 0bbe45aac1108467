"""What a block does to each token on its own: one MLP, gated or not, or several experts of which each token uses a few."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from common.model.config import ModelConfig


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's approximation, which differs from the exact function by up to 5e-4 (gallery: blocks/gelu-variant)."""
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    """So et al. 2021, "Primer"."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu_squared,
    "swiglu": F.silu,  # of the gate
}


class MLP(nn.Module):
    """down(f(up(x))), or down(f(gate(x)) * up(x)) where gated (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden, bias = config.width, config.hidden, config.mlp_bias
        self.activation = ACTIVATIONS[config.mlp]
        self.gate = nn.Linear(width, hidden, bias=bias) if config.gated else None
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Routing(NamedTuple):
    """How the tokens of a layer were distributed over its experts.

    Attributes:
        load: (experts,) the share of all assignments that each expert got. It sums to 1.
        balance: experts * sum(load * mean router probability). It is 1 if both are uniform, and up to `experts` if one
            expert takes everything (Fedus et al. 2021, equations 4 to 6). Only the probabilities carry a gradient.
    """

    load: Float[Tensor, "experts"]
    balance: Float[Tensor, ""]


class MixtureOfExperts(nn.Module):
    """Each token goes to its `experts_per_token` most probable experts; their outputs are averaged by probability.

    The probabilities of the chosen experts are scaled to sum to one (as in Mixtral). Experts have no capacity limit, so no
    token is ever dropped; each expert processes its tokens in one matrix product per weight.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.count, self.chosen = config.experts, config.experts_per_token
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.gate = nn.Parameter(torch.empty(config.experts, config.hidden, config.width))
        self.up = nn.Parameter(torch.empty(config.experts, config.hidden, config.width))
        self.down = nn.Parameter(torch.empty(config.experts, config.width, config.hidden))

    def forward(
        self, x: Float[Tensor, "B T C"], pad_mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T C"], Routing]:
        flat = x.flatten(0, 1)  # (N, C)
        probabilities = self.router(flat).float().softmax(dim=-1)  # (N, experts)
        weights, expert = probabilities.topk(self.chosen, dim=-1)  # (N, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        order = expert.flatten().argsort(stable=True)  # assignments, sorted by expert
        token = order // self.chosen
        counts = torch.bincount(expert.flatten(), minlength=self.count)
        mine = weights.flatten()[order, None].to(x.dtype)
        parts = []
        for e, inputs in enumerate(flat[token].split(counts.tolist())):
            inner = F.silu(inputs @ self.gate[e].T) * (inputs @ self.up[e].T)
            parts.append(inner @ self.down[e].T)
        out = torch.zeros_like(flat).index_add(0, token, (torch.cat(parts) * mine).to(flat.dtype))
        return out.view_as(x), self._routing(probabilities, expert, pad_mask)

    def _routing(self, probabilities: Tensor, expert: Tensor, pad_mask: Tensor | None) -> Routing:
        """The statistics of this layer over the real tokens. `probabilities` is (N, experts), `expert` (N, chosen)."""
        if pad_mask is not None:
            real = ~pad_mask.flatten()
            probabilities, expert = probabilities[real], expert[real]
        load = torch.bincount(expert.flatten(), minlength=self.count).float() / max(expert.numel(), 1)
        return Routing(load, self.count * (load * probabilities.sum(dim=0) / max(len(probabilities), 1)).sum())
