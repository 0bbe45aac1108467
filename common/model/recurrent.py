"""Before attention: a plain recurrent cell and the LSTM, from their equations, behind the same interface.

A recurrent model reads one token at a time into a state of fixed size; whatever it is to recall must survive every step in
between. The LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000) gives the state a path of
additions, which keeps gradients alive longer. The projections of all inputs are computed in one product; only the product
with the state runs step by step. Tests check that both equal torch's modules.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.model.initialise import initialise
from common.model.masks import document_starts
from common.model.output import Output
from common.model.registry import registered


def rnn_step(projected: Tensor, state: Tensor, recurrent: nn.Linear) -> Tensor:
    """h' = tanh(W x + U h + b). `projected` is W x + b, (B, C); `state` is h, (1, B, C)."""
    return torch.tanh(projected + recurrent(state[0]))[None]


def lstm_step(projected: Tensor, state: Tensor, recurrent: nn.Linear) -> Tensor:
    """c' = f c + i g, h' = o tanh(c'). `projected` is (B, 4 C), gates i, f, g, o; `state` h and c, (2, B, C)."""
    i, f, g, o = (projected + recurrent(state[0])).chunk(4, dim=-1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return torch.stack([o.sigmoid() * cell.tanh(), cell])


STEPS = {"rnn": (rnn_step, 1, 1), "lstm": (lstm_step, 4, 2)}  # function, projections per unit, tensors in the state


class RecurrentLayer(nn.Module):
    """One layer over a sequence, (B, T, C) to (B, T, C)."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.step, projections, self.states = STEPS[kind]
        self.input = nn.Linear(width, projections * width)
        self.recurrent = nn.Linear(width, projections * width)

    def forward(
        self, x: Float[Tensor, "B T C"], fresh: Bool[Tensor, "B T"], skip: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T C"]:
        """`fresh`: True where the state is zero before this token. `skip`: True where a token leaves the state as it is."""
        projected, made = self.input(x).unbind(1), []
        state = x.new_zeros(self.states, len(x), x.shape[-1])
        resets, skips = bool(fresh[:, 1:].any()), bool(skip.any())
        for t, now in enumerate(projected):
            before = torch.where(fresh[:, t, None], 0.0, state) if resets else state
            after = self.step(now, before, self.recurrent)
            state = (
                torch.where(skip[:, t, None], state, after) if skips else after
            )  # not the other way round (gallery: blocks/frozen-state)
            made.append(state[0])
        return torch.stack(made, dim=1) if made else x


@registered("recurrent")
class Recurrent(nn.Module):
    """A recurrent language model. See LanguageModel.

    Args:
        kind: "rnn" or "lstm".
        width: C, of the embeddings and of the state of each layer.
        seed: of the initial weights.
        forget_bias: initial bias of the LSTM's forget gate. With 0, half of the state is forgotten at each token; with 1, a
            quarter (Jozefowicz et al. 2015).
    """

    bounded = False

    def __init__(
        self,
        kind: Literal["rnn", "lstm"],
        vocab_size: int,
        width: int = 128,
        layers: int = 1,
        *,
        seed: int = 0,
        forget_bias: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in STEPS:
            raise ValueError(f"kind {kind!r} is unknown; there are {', '.join(STEPS)}")
        self.kind, self.vocab_size, self.width, self.seed = kind, vocab_size, width, seed
        self.context_length = 1_000_000  # the architecture has no limit: the state carries what it can
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(RecurrentLayer(kind, width) for _ in range(layers))
        self.head = nn.Linear(width, vocab_size)
        initialise(self, seed, init="fan_in", branches=1)
        if kind == "lstm":
            for layer in self.layers:
                nn.init.constant_(layer.input.bias[width : 2 * width], forget_bias)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        pad_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Output:
        fresh, skip = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        if document_ids is not None:
            fresh = document_starts(document_ids, pad_mask)
        if pad_mask is not None:
            skip = pad_mask
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, fresh, skip)
        return Output(self.head(x))

    def describe(self) -> dict[str, Any]:
        """See registry.Describable. The seed and the initial forget bias are not described: they are in the weights."""
        shape = {"cell": self.kind, "width": self.width, "layers": len(self.layers)}
        return {"kind": "recurrent", "vocab_size": self.vocab_size, **shape}

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> Self:
        return cls(described["cell"], described["vocab_size"], described["width"], described["layers"])

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, context: int = 0) -> int:
        """FLOPs of a forward pass for one token. They do not depend on the context: that is the point of a state."""
        projections = STEPS[self.kind][1]
        return 2 * (len(self.layers) * 2 * projections * self.width**2 + self.width * self.vocab_size)
