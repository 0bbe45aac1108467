"""The classic: characters of Shakespeare, a context of 64, and nanoGPT's recipe for a CPU against a recipe of today.

Both are trained here, by the same trainer, on windows of the same text, and scored on the same windows of 64 characters.
What counts is characters read and arithmetic done. What they cost in seconds depends on the processor: bench/may.py
measures it.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from common.data.corpora import tiny_shakespeare
from common.data.stream import RandomWindows
from common.foundation.device import pick_device
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.training.loss import language_model_loss
from common.training.optimizers import Optimizers, groups_of, make_optimizers
from common.training.schedules import Schedule
from common.training.trainer import Settings, Trainer

CONTEXT = 64


@dataclass(frozen=True)
class Recipe:
    """Everything that is chosen before a training.

    Attributes:
        architecture: "gpt2" learned positions, LayerNorm, GELU; "llama" rotary positions, RMSNorm, SwiGLU.
        rows: windows in a batch.
    """

    architecture: Literal["gpt2", "llama"] = "gpt2"
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    rows: int = 12
    dtype: Literal["float32", "bfloat16"] = "float32"
    warmup: int = 100
    kind: Literal["cosine", "wsd"] = "cosine"


# config/train_shakespeare_char.py of nanoGPT with the flags that its README gives for a CPU: 4 layers, 4 heads, width 128,
# batch 12, 2,000 steps, no dropout, AdamW at 1e-3 falling to 1e-4, beta2 0.99, decay 0.1.
NANOGPT = Recipe()
OURS = Recipe("llama", "muon", 4e-3, 24, "bfloat16", warmup=20, kind="wsd")
# One choice taken back at a time.
WITHOUT = {
    "in fp32": replace(OURS, dtype="float32"),
    "with nanoGPT's architecture": replace(OURS, architecture="gpt2"),
    "with AdamW": replace(OURS, optimizer="adamw"),
    "with nanoGPT's learning rate": replace(OURS, learning_rate=1e-3),
}
RECIPES = {"nanoGPT": NANOGPT, "ours": OURS, "ours, longer": OURS, **WITHOUT}


@dataclass(frozen=True)
class Characters:
    """The text as numbers of characters: nine tenths to train on, the last tenth to score."""

    train: np.ndarray
    held_out: np.ndarray
    alphabet: str

    @classmethod
    def of_shakespeare(cls) -> "Characters":
        text = tiny_shakespeare()
        alphabet = "".join(sorted(set(text)))
        ids = np.searchsorted(list(alphabet), list(text))
        cut = int(0.9 * len(ids))
        return cls(ids[:cut], ids[cut:], alphabet)

    def scored_on(self, share: float) -> "Characters":
        """The same with the first part of the text to score."""
        return replace(self, held_out=self.held_out[: max(4 * CONTEXT, round(share * len(self.held_out)))])


def make_model(recipe: Recipe, vocab_size: int, seed: int) -> Transformer:
    shape = {"vocab_size": vocab_size, "context_length": CONTEXT, "layers": 4, "width": 128, "heads": 4}
    if recipe.architecture == "gpt2":
        return Transformer(ModelConfig(**shape, positions="learned", norm="layer", mlp="gelu"), seed=seed)
    return Transformer(ModelConfig(**shape, init="fan_in"), seed=seed)


@torch.no_grad()
def held_out_nats(model: Transformer, ids: np.ndarray, each: int = 1) -> float:
    """Mean over windows of 64 characters that do not overlap, every `each`-th of them, in fp32: the same for all recipes."""
    count = (len(ids) - 1) // CONTEXT
    inputs = torch.from_numpy(ids[: count * CONTEXT]).view(count, CONTEXT)[::each]
    targets = torch.from_numpy(ids[1 : count * CONTEXT + 1]).view(count, CONTEXT)[::each]
    sums = [
        language_model_loss(model(x).logits, y).sum for x, y in zip(inputs.split(256), targets.split(256), strict=True)
    ]
    return float(sum(sums)) / targets.numel()


def run_recipe(
    recipe: Recipe, text: Characters, steps: int, *, seed: int = 0, every: int | None = None
) -> dict[str, Any]:
    """Train for `steps` updates.

    Returns:
        "curve": updates, characters read, nats on every fourth window; "nats": on all windows at the end;
        "flops_per_character": of an update, forward and backward.
    """
    model = make_model(recipe, len(text.alphabet), seed)
    rounded = recipe.dtype == "bfloat16" and not pick_device("cpu").has_bf16
    dtype = torch.float32 if rounded else getattr(torch, recipe.dtype)
    if recipe.optimizer == "adamw":  # torch's own fused step: the fastest there is for the baseline
        decays = {"hidden": 0.1, "table": 0.1, "plain": 0.0}
        groups = groups_of(model)
        rows = [{"params": list(groups[k].values()), "weight_decay": decays[k]} for k in groups]
        torchs = torch.optim.AdamW(rows, lr=recipe.learning_rate, betas=(0.9, 0.99), fused=True)
        optimizers = Optimizers([torchs], dict(model.named_parameters()))
    else:
        optimizers = make_optimizers(
            model, "muon", learning_rate=recipe.learning_rate, weight_decay=0.1, muon_dtype=dtype
        )
    curve = []

    def score(model: Transformer, done: int) -> dict[str, float]:
        curve.append(
            {"step": done, "characters": done * recipe.rows * CONTEXT, "nats": held_out_nats(model, text.held_out, 4)}
        )
        return {}

    stream = RandomWindows(text.train, length=CONTEXT, batch_size=recipe.rows, seed=seed)
    schedule = Schedule(steps, recipe.warmup, recipe.kind, floor=0.1 if recipe.kind == "cosine" else 0.0)
    settings = Settings(dtype=dtype, rounded=rounded, evaluate_every=every)
    Trainer(model, stream, optimizers, schedule, settings, evaluate=score, label="classic").train()
    return {
        "curve": curve,
        "nats": held_out_nats(model, text.held_out),
        "flops_per_character": 3 * model.flops_per_token(CONTEXT),
    }
