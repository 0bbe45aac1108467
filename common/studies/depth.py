"""What makes depth trainable, and which part of a block earns its place: April's studies, on bytes of Shakespeare.

Three questions, each at a size that answers in seconds: how large are signal and gradient at each depth before any training;
at which learning rate does training break; what is lost when one part is replaced, at equal arithmetic.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from common.data.corpora import shakespeare_scenes, split_by_play
from common.data.documents import Batch
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.training.fit import Fit, fit
from common.training.loss import bits, language_model_loss

BASE = ModelConfig(vocab_size=256, context_length=64, layers=3, width=64, heads=4, init="fan_in", tied=False)
# One part changed at a time. Everything else, the data and the arithmetic spent stay.
PARTS = {
    "as it is": {},
    "LayerNorm": {"norm": "layer"},
    "post-norm": {"norm_placement": "post"},
    "sandwich norm": {"norm_placement": "sandwich"},
    "no norm": {"norm_placement": "none"},
    "no residual": {"residual": False},
    "no MLP": {"mlp": "none"},
    "GELU": {"mlp": "gelu"},
    "squared ReLU": {"mlp": "relu2"},
    "learned positions": {"positions": "learned"},
    "no positions": {"positions": "none"},
    "one key-value head": {"key_value_heads": 1},
    "QK-norm": {"qk_norm": True},
    "no 1/sqrt(D)": {"attention_scale": 1.0},
    "tied head": {"tied": True},
    "GPT-2's init": {"init": "gpt2"},
    "soft-cap 15": {"logit_softcap": 15.0},
    "z-loss 1e-4": {"z_loss": 1e-4},
    "4 experts, 2 used": {"experts": 4, "hidden_width": 88},
    "latent attention": {
        "attention": "latent",
        "head_width": 16,
        "latent_width": 32,
        "rope_head_width": 8,
        "value_head_width": 16,
    },
}


@dataclass(frozen=True)
class Bytes:
    """Training and held-out text as one array of bytes each; a batch is a function of its number."""

    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of_plays(cls) -> "Bytes":
        plays = split_by_play(shakespeare_scenes())
        joined = {part: "\n".join(scene.text for scene in plays[part]).encode() for part in ("train", "validation")}
        return cls(*(np.frombuffer(joined[part], dtype=np.uint8) for part in ("train", "validation")))

    def batch(self, number: int, rows: int = 8, length: int = 64, *, held_out: bool = False) -> Batch:
        """Windows at random places."""
        text = self.held_out if held_out else self.train
        places = np.random.default_rng((int(held_out), number)).integers(0, len(text) - length - 1, rows)
        ids = torch.from_numpy(np.stack([text[p : p + length + 1] for p in places]).astype(np.int64))
        mask = torch.ones(rows, length, dtype=torch.bool)
        return Batch(ids[:, :-1], ids[:, 1:], mask, torch.zeros(rows, length, dtype=torch.int64))


@torch.no_grad()
def bits_per_byte(model: Transformer, text: Bytes, rows: int = 256) -> float:
    """On held-out windows, the same for every model. Windows are short, so this is above what a long context gives."""
    batch = text.batch(0, rows, held_out=True)
    return bits(float(language_model_loss(model(batch.inputs).logits, batch.targets).mean))


def norms_by_depth(config: ModelConfig, batch: Batch, seed: int = 0) -> tuple[list[float], list[float]]:
    """(signal, gradient) after the embedding and after each block, before any training.

    Signal is the root mean square of the stream; gradient the norm of the loss's gradient by it.
    """
    model = Transformer(config, seed=seed)
    seen: list[torch.Tensor] = []

    def keep(_: object, inputs: tuple, output: tuple) -> None:
        output[0].retain_grad()
        seen.append(output[0])

    first = model.embedding.register_forward_hook(lambda _module, _inputs, output: keep(None, (), (output,)))
    hooks = [first, *(block.register_forward_hook(keep) for block in model.blocks)]
    language_model_loss(model(batch.inputs).logits, batch.targets).mean.backward()
    for hook in hooks:
        hook.remove()
    signal = [float(x.detach().square().mean().sqrt()) for x in seen]
    return signal, [float(x.grad.norm()) for x in seen]


def train(
    config: ModelConfig, text: Bytes, steps: int, *, seed: int = 0, learning_rate: float = 6e-3, **more
) -> tuple[Transformer, Fit]:
    """A model of this config on the byte task. Seeds differ in weights and in batches."""
    model = Transformer(config, seed=seed)
    start = 100_000 * seed
    return model, fit(model, lambda step: text.batch(start + step), steps, learning_rate=learning_rate, **more)


def equal_steps(config: ModelConfig, steps: int, base: ModelConfig = BASE) -> int:
    """Steps after which this config has spent the arithmetic that `base` spends in `steps`."""
    length = base.context_length
    return round(steps * Transformer(base).flops_per_token(length) / Transformer(config).flops_per_token(length))


def ablation(name: str, text: Bytes, steps: int, seed: int) -> float:
    """Bits per byte of the base with one part replaced, at equal arithmetic; infinite where it diverged."""
    config = BASE.but(**PARTS[name])
    model, run = train(config, text, equal_steps(config, steps), seed=seed, label=f"{name}, seed {seed}")
    return math.inf if run.diverged_at is not None else bits_per_byte(model, text)


# How far the learning rate can go, in deep models: which knob moves the edge of divergence?
KNOBS = {
    "pre-norm": {},
    "post-norm": {"norm_placement": "post"},
    "sandwich norm": {"norm_placement": "sandwich"},
    "no norm": {"norm_placement": "none"},
    "pre-norm, QK-norm": {"qk_norm": True},
    "pre-norm, zero output": {"init": "zero_output"},
}
DEEP = BASE.but(layers=10, width=48)


def loss_at_rate(knob: str, text: Bytes, steps: int, learning_rate: float, seed: int = 0) -> float:
    """Mean loss of the last tenth of a short training without clipping, in nats; infinite where it diverged."""
    config = DEEP.but(**KNOBS[knob])
    _, run = train(
        config, text, steps, seed=seed, learning_rate=learning_rate, clip=None, label=f"{knob}, rate {learning_rate:g}"
    )
    last = run.losses[-max(1, steps // 10) :]
    return math.inf if run.diverged_at is not None else sum(last) / len(last)


def unigram_nats(text: Bytes) -> float:
    """What is reached by knowing how frequent each byte is, and nothing about order: training that ends above is broken."""
    counts = np.bincount(text.train, minlength=256).astype(float)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
