"""The initialisation table: how every parameter is drawn before training.

| init          | embedding | matrices              | last matrix of a branch        |
|---------------|-----------|-----------------------|--------------------------------|
| `gpt2`        | 0.02      | 0.02                  | 0.02 / sqrt(2 · layers)        |
| `fan_in`      | 0.02      | 1 / sqrt(inputs)      | 1 / sqrt(inputs · 2 · layers)  |
| `zero_output` | 0.02      | 1 / sqrt(inputs)      | 0                              |

All numbers are standard deviations of a normal distribution (0.02 is `init_std`); norms start at one, biases at zero. The
last matrix of a branch writes to the residual stream. The outputs of 2 · layers branches add up there, so each is made
smaller (GPT-2 section 2.3). Each parameter has its own generator, seeded with its name, so leaving out one part of a model
does not change the initial values of any other.
"""

import contextlib
import math
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import nn

from common.foundation.files import sha256_json

BRANCH_ENDS = ("attention.output.weight", "mlp.down.weight", "mlp.down")


@torch.no_grad()
def initialise(
    model: nn.Module, seed: int, *, init: str = "gpt2", branches: int = 1, embedding_std: float = 0.02
) -> None:
    """Set every parameter as the table says.

    Args:
        init: the row of the table.
        branches: the number of branches that write to the residual stream, 2 · layers.
        embedding_std: standard deviation of embeddings, and of all matrices in the row `gpt2`.
    Raises:
        ValueError: no rule of the table covers a parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        kind = name.rpartition(".")[2]
        if kind == "bias":
            parameter.zero_()
        elif parameter.ndim == 1 and "norm" in name:
            parameter.fill_(1.0)
        elif parameter.ndim >= 2:
            if name in ("embedding.weight", "position_table.weight") or init == "gpt2":
                std = embedding_std
            else:
                std = 1 / math.sqrt(parameter.shape[-1])
            if name.endswith(BRANCH_ENDS):
                std = 0.0 if init == "zero_output" else std / math.sqrt(branches)
            number = int(sha256_json([seed, name])[:15], 16)
            parameter.normal_(0.0, std, generator=torch.Generator(parameter.device).manual_seed(number))
        else:
            raise ValueError(f"no rule of the initialisation table covers {name} {tuple(parameter.shape)}")


@contextlib.contextmanager
def without_storage() -> Iterator[None]:
    """Modules that are made inside this context have names and shapes and no storage (torch's "meta" device).

    It serves to count parameters, and to build a model whose weights are assigned later. torch's own initialisation is
    skipped: there is nothing to draw, and on this device it would first import a compiler, which takes over a second.
    """
    with (
        torch.device("meta"),
        patch.object(nn.Linear, "reset_parameters", lambda self: None),
        patch.object(nn.Embedding, "reset_parameters", lambda self: None),
    ):
        yield
