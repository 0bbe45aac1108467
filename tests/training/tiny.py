"""What the tests of trainings share: a tiny model, a stream of random documents, and a trainer of them."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from common.data.stream import BatchStream
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.tokenization.protocol import END_OF_TEXT
from common.training.objectives import PreparedTokens, TokenObjective
from common.training.optimizers import make_optimizers
from common.training.schedules import Schedule
from common.training.trainer import Settings, Trainer

V, END, LENGTH = 31, 0, 8
CONFIG = ModelConfig(vocab_size=V, context_length=16, layers=2, width=16, heads=2, init="fan_in")


class Words:
    """As much of a tokenizer as a training looks at."""

    vocab_size, specials = V, {END_OF_TEXT: END}

    def __init__(self, fingerprint="words, 31 of them"):
        self.fingerprint = fingerprint


def tokens_of(count=1600, seed=0):
    """Documents of about nine tokens, each token the one before it plus 1 or 2: there is something to learn."""
    rng = np.random.default_rng(seed)
    tokens = 1 + np.cumsum(rng.integers(1, 3, count)) % (V - 1)
    tokens[rng.random(count) < 0.1] = END
    tokens[0] = END
    return tokens


def stream_of(batch_size=4, *, count=1601, seed=0, **options):
    """1,600 pairs are 200 chunks: 50 batches of 4 rows, without padding."""
    return BatchStream(tokens_of(count), length=LENGTH, batch_size=batch_size, end_of_text=END, seed=seed, **options)


@dataclass(frozen=True)
class Ragged(TokenObjective):
    """Next token, with a mask that is a function of each row alone: often no target at all, at most all but three."""

    def prepare(self, batch, number):
        keep = torch.arange(LENGTH) < (batch.inputs.sum(dim=1) % (LENGTH + 1) - 3)[:, None]
        return PreparedTokens(replace(batch, loss_mask=batch.loss_mask & keep))


def trainer_of(
    *, config=CONFIG, stream=None, model=None, kind="adamw", rate=1e-2, decay=0.1, steps=10, warmup=2, seed=0, **options
):
    """A trainer; fields of Settings may stand among its own."""
    model = Transformer(config, seed=1) if model is None else model
    chosen = {name: options.pop(name) for name in list(options) if name in Settings.__dataclass_fields__}
    optimizers = make_optimizers(model, kind, learning_rate=rate, weight_decay=decay, muon_dtype=torch.float32)
    schedule = options.pop("schedule", Schedule(steps, warmup))
    stream = stream_of() if stream is None else stream
    return Trainer(model, stream, optimizers, schedule, Settings(seed=seed, **chosen), **options)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(these, those):
    """Bit for bit."""
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


def losses_of(trainer):
    return [row["loss"] for row in trainer.history]
