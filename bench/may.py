"""A training step of ours against a plain loop with transformers' GPT-2 at equal shape: ratios within one run.

    python bench/may.py

Theirs: `model(ids, labels=ids).loss.backward()`, clipping, torch's AdamW, fp32, as a tutorial would write it. Ours: the
Trainer as it is used in May, in the number format that this machine is faster in. Measured in pairs, in turn; above 1 means
that ours is faster. Utilisation is the share of the measured matrix peak that a step reaches. Then what the chunked loss
saves at a large vocabulary, and what a character costs in nanoGPT's recipe and in ours: May says how many fewer of them ours
needs, and the product of the two is the ratio of the times.
"""

import dataclasses
import json
import statistics
import warnings
from functools import partial

import numpy as np
import torch
import transformers
from timing import in_turn

from common.data.stream import RandomWindows
from common.foundation.device import pick_device
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.studies import classic
from common.training.loss import chunked_language_model_loss, language_model_loss
from common.training.optimizers import make_optimizers
from common.training.schedules import Schedule
from common.training.trainer import Settings, Trainer

# vocabulary, context, layers, heads, width, rows, updates of a measurement
SHAPES = {"0.8 M": (65, 64, 4, 4, 128, 12, 10), "10.7 M": (65, 256, 6, 6, 384, 16, 2)}


def theirs_of(vocab, context, layers, heads, width):
    config = transformers.GPT2Config(
        vocab_size=vocab, n_positions=context, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=None,
        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def speed(name):
    vocab, context, layers, heads, width, rows, updates = SHAPES[name]
    device, tokens = pick_device(), np.random.default_rng(0).integers(0, vocab, 100_000)
    model, optimizer = theirs_of(vocab, context, layers, heads, width)
    batches = RandomWindows(tokens, length=context, batch_size=rows)

    def theirs():
        for _ in range(updates):
            ids = batches.next_batch().inputs
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    shape = ModelConfig.preset(
        "gpt2", vocab_size=vocab, context_length=context, layers=layers, heads=heads, width=width
    )
    ours = Transformer(shape)
    trainer = Trainer(
        ours, RandomWindows(tokens, length=context, batch_size=rows), make_optimizers(ours, "adamw", learning_rate=1e-3),
        Schedule(10**6, kind="constant"), Settings(dtype=device.dtype),
    )  # fmt: skip

    def mine():
        for _ in range(updates):
            trainer.update()

    pairs = in_turn(mine, theirs, repeat=9)
    ratios, best = [there / here for here, there in pairs], min(here for here, _ in pairs)
    speed = rows * context * updates / best
    return {
        "parameters": [ours.num_parameters(), model.num_parameters()],
        "theirs / ours, median": round(statistics.median(ratios), 2),
        "theirs / ours, range": [round(min(ratios), 2), round(max(ratios), 2)],
        "our tokens a second": round(speed),
        "their tokens a second": round(rows * context * updates / min(there for _, there in pairs)),
        "our share of the measured peak": round(3 * ours.flops_per_token(context) * speed / device.peak_flops, 3),
    }


def losses():
    """Forward and backward of the loss alone: 4,096 positions, 16,384 tokens."""
    hidden, head = torch.randn(8, 512, 256, requires_grad=True), torch.randn(16_384, 256, requires_grad=True)
    targets = torch.randint(16_384, (8, 512))
    pairs = in_turn(
        lambda: chunked_language_model_loss(hidden, head, targets).mean.backward(),
        lambda: language_model_loss(hidden @ head.mT, targets).mean.backward(),
        repeat=3,
    )
    return {
        "plain / chunked, seconds": round(statistics.median(there / here for here, there in pairs), 2),
        "bytes of logits that are never whole": 2 * 4 * targets.numel() * len(head),
    }


def recipes():
    """Seconds for the same number of characters, nanoGPT's recipe / ours, in the format this machine is faster in."""
    text = classic.Characters.of_shakespeare()
    ours = dataclasses.replace(classic.OURS, dtype=str(pick_device().dtype).removeprefix("torch."))
    runs = [
        partial(classic.run_recipe, recipe, text.scored_on(0.0), steps)
        for recipe, steps in ((ours, 20), (classic.NANOGPT, 40))
    ]
    pairs = in_turn(*runs, repeat=5)
    ratios = [there / here for here, there in pairs]
    return {"median": round(statistics.median(ratios), 2), "range": [round(min(ratios), 2), round(max(ratios), 2)]}


def main():
    torch.manual_seed(0)
    print(
        json.dumps(
            {
                **{name: speed(name) for name in SHAPES},
                "loss": losses(),
                "seconds a character": recipes(),
                "on": str(pick_device()),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
