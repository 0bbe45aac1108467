"""A small scaling law: loss against size at equal data, fitted on four models, asked about a fifth that is not in the fit.

    L(N) = a * N ** -b,   N parameters beside the embedding

A straight line in logarithms (Kaplan et al. 2020, equation 1.1). Over a range this small an irreducible term cannot be told
from the slope, so there is none; further out the line must be too low.
"""

from dataclasses import dataclass

import numpy as np

from common.data.stream import RandomWindows
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.studies.classic import CONTEXT, Characters, held_out_nats
from common.training.quick import quick_training

WIDTHS, ASKED = (16, 24, 32, 48), 80  # fitted, predicted


@dataclass(frozen=True)
class PowerLaw:
    """a * n ** -b."""

    a: float
    b: float

    def __call__(self, n: float) -> float:
        return self.a * n**-self.b


def fit_power_law(n: list[float], losses: list[float]) -> PowerLaw:
    """Least squares in logarithms.

    >>> law = fit_power_law([10, 100, 1000], [3.0, 1.5, 0.75])
    >>> round(law(10_000), 3)
    0.375
    """
    slope, intercept = np.polyfit(np.log(n), np.log(losses), 1)
    return PowerLaw(float(np.exp(intercept)), float(-slope))


def shape(width: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, context_length=CONTEXT, layers=2, width=width, heads=max(1, width // 16), init="fan_in"
    )


def hidden_parameters(config: ModelConfig) -> int:
    """Without the embedding, as Kaplan et al. count: a table of letters is not what grows with the model."""
    model = Transformer(config)
    return model.num_parameters() - model.embedding.weight.numel()


def small_training(
    config: ModelConfig, text: Characters, characters: int, *, rows: int, learning_rate: float, seed: int
) -> float:
    """Held-out nats per character after a training of so many characters, in fp32."""
    model, steps = Transformer(config, seed=seed), max(1, characters // (rows * config.context_length))
    stream = RandomWindows(text.train, length=config.context_length, batch_size=rows, seed=seed)
    quick_training(model, stream, steps, learning_rate=learning_rate).train()
    return held_out_nats(model, text.held_out)


def loss_of_width(width: int, text: Characters, characters: int, seed: int) -> float:
    """One point of the law."""
    config = shape(width, len(text.alphabet))
    return small_training(config, text, characters, rows=24, learning_rate=4e-3, seed=seed)


NOISE = shape(32, 64)  # its vocabulary is set from the text


def loss_of_setting(learning_rate: float, rows: int, text: Characters, characters: int, seed: int) -> float:
    """One cell of the grid of learning rates and batch sizes, at equal characters."""
    config = NOISE.but(vocab_size=len(text.alphabet))
    return small_training(config, text, characters, rows=rows, learning_rate=learning_rate, seed=seed)
