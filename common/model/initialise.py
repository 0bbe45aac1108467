"""The initialisation table: what every parameter is before training.

| init          | embedding | matrices              | last matrix of a branch        |
|---------------|-----------|-----------------------|--------------------------------|
| `gpt2`        | 0.02      | 0.02                  | 0.02 / sqrt(2 · layers)        |
| `fan_in`      | 0.02      | 1 / sqrt(inputs)      | 1 / sqrt(inputs · 2 · layers)  |
| `zero_output` | 0.02      | 1 / sqrt(inputs)      | 0                              |

All numbers are standard deviations of a normal distribution (0.02 is `init_std`); norms start at one, biases at zero. The
last matrix of a branch writes to the residual stream: 2 · layers of them add up, so each is made smaller (GPT-2 section
2.3). Each parameter draws from a generator of its own, seeded by its name: leaving one part out changes no other.
"""

import math

import torch
from torch import nn

from common.foundation.files import sha256_json

BRANCH_ENDS = ("output.weight", "down.weight", "mlp.down")


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Set every parameter by the table of `model.config.init`. Raises ValueError for one that no rule covers."""
    config = model.config
    branches = math.sqrt(2 * config.layers)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        kind = name.rpartition(".")[2]
        if kind == "bias":
            parameter.zero_()
        elif parameter.ndim == 1 and "norm" in name:
            parameter.fill_(1.0)
        elif parameter.ndim >= 2:
            if name in ("embedding.weight", "position_table.weight") or config.init == "gpt2":
                std = config.init_std
            else:
                std = 1 / math.sqrt(parameter.shape[-1])
            if name.endswith(BRANCH_ENDS):
                std = 0.0 if config.init == "zero_output" else std / branches
            number = int(sha256_json([seed, name])[:15], 16)
            parameter.normal_(0.0, std, generator=torch.Generator(parameter.device).manual_seed(number))
        else:
            raise ValueError(f"no rule of the initialisation table covers {name} {tuple(parameter.shape)}")
