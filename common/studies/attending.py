"""Small trainings with one question each: what can this mechanism learn? Notebooks and months call the same ones.

All are seconds on a laptop, on tasks of common/data/synthetic.py whose answers are known. Batches are a function of the step
and tests use a seed that training never reaches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from common.data import synthetic
from common.data.documents import Batch
from common.data.shards import Shards
from common.data.stream import BatchStream
from common.foundation.statistics import Interval, mean_ci
from common.model.attention_heads import induction_score, previous_token_score, without_heads
from common.model.config import ModelConfig
from common.model.geometry import cohesion, directions, like_in_frequency, nearest, pair_cosines, spelling_pairs
from common.model.recurrent import Recurrent
from common.model.transformer import Transformer
from common.tokenization.bpe import BPETokenizer, show_token
from common.training.fit import Fit, fit

UNSEEN = 10**6  # a seed beyond every step of every study
VOCABULARY = 32  # of the small tasks; chance is one in as many
ONE_LAYER = ModelConfig(vocab_size=VOCABULARY, context_length=64, layers=1, width=64, heads=4, init="fan_in")


def study(work: Callable, **arguments: Any) -> Any:
    """work(**arguments): different studies as jobs of one `parallel.each`."""
    return work(**arguments)


def scores(model: nn.Module, batch: Batch) -> list[float]:
    """Share of right answers in each row of a batch."""
    with torch.no_grad():
        right = (model(batch.inputs).logits.argmax(-1) == batch.targets) & batch.loss_mask
    return (right.sum(1) / batch.loss_mask.sum(1)).tolist()


def scored(models: list[nn.Module], batch: Batch) -> Interval:
    """Accuracy with an interval over the rows of all models together."""
    return mean_ci([score for model in models for score in scores(model, batch)])


def learn_order(
    positions: str, *, steps: int, seed: int = 0, back: int = 1, length: int = 32
) -> tuple[Transformer, Fit]:
    """One layer, told about order in this way, learns which token stood `back` places before."""
    # Sinusoids are of size 1, embeddings start at 0.02: the paper multiplies embeddings by sqrt(C), or they drown.
    scale = ONE_LAYER.width**0.5 if positions == "sinusoidal" else 1.0
    model = Transformer(ONE_LAYER.but(positions=positions, embedding_scale=scale), seed=seed)
    start = 1000 * seed
    batch_at = lambda step: synthetic.previous(32, length, VOCABULARY, start + step, back=back)  # noqa: E731
    return model, fit(model, batch_at, steps, label=f"order by {positions}")


def learn_recall(kind: str, gap: int, *, steps: int, seed: int = 0) -> tuple[nn.Module, Fit]:
    """One layer of attention, RNN or LSTM, equally wide, learns to name a value again after `gap` tokens of noise."""
    vocabulary = 24
    if kind == "attention":
        model: nn.Module = Transformer(ONE_LAYER.but(vocab_size=vocabulary), seed=seed)
    else:
        model = Recurrent(kind, vocabulary, ONE_LAYER.width, seed=seed)
    start = 1000 * seed
    batch_at = lambda step: synthetic.recall(64, gap, vocabulary, start + step, pairs=1)  # noqa: E731
    return model, fit(model, batch_at, steps, label=f"recall after {gap} by {kind}")


def learn_to_look_up(
    *, steps: int, seed: int = 0, layers: int = 2, watch: Callable[[Transformer, int], None] | None = None
) -> tuple[Transformer, Fit]:
    """Layers of attention alone learn sequences that begin again after a period that varies."""
    config = ONE_LAYER.but(layers=layers, heads=2, mlp="none", tied=False)
    model, start = Transformer(config, seed=seed), 1000 * seed
    batch_at = lambda step: synthetic.repeated(32, 48, VOCABULARY, start + step)  # noqa: E731
    seen = None if watch is None else (lambda step: watch(model, step))
    return model, fit(model, batch_at, steps, learning_rate=5e-3, label=f"look-up, {layers} layers", watch=seen)


def learn_words(shards: Shards, *, steps: int, seed: int = 0) -> tuple[Transformer, Fit]:
    """Two layers read the year's tokens for a short while. Its embeddings are what we are after."""
    config = ModelConfig(
        vocab_size=shards.about["vocab_size"], context_length=64, layers=2, width=96, heads=4, init="fan_in"
    )
    model = Transformer(config, seed=seed)
    end = shards.about["end_of_text"]
    stream = BatchStream(shards, length=64, batch_size=16, end_of_text=end, seed=seed)
    return model, fit(model, lambda _: stream.next_batch(), steps, learning_rate=4e-3, label="embeddings")


def watched_look_up(*, steps: int, seed: int = 0) -> tuple[Transformer, Fit, list[int], dict[str, list[float]]]:
    """`learn_to_look_up` with a history: (model, fit, steps at which it was looked at, what was seen at each)."""
    test = synthetic.repeated(128, 48, VOCABULARY, UNSEEN)
    every, places = max(1, steps // 35), []
    seen: dict[str, list[float]] = {
        "accuracy": [],
        "best previous-token head, layer 1": [],
        "best induction head, layer 2": [],
    }

    def watch(model: Transformer, step: int) -> None:
        if step % every == 0:
            with torch.no_grad():
                first, second = model(test.inputs, want=["attention"]).aux["attention"]
            now = (
                scored([model], test).mean,
                previous_token_score(first).max(),
                induction_score(second, test.inputs).max(),
            )
            places.append(step)
            for values, value in zip(seen.values(), now, strict=True):
                values.append(float(value))

    model, result = learn_to_look_up(steps=steps, seed=seed, watch=watch)
    return model, result, places, seen


def silenced(model: Transformer, test: Batch) -> dict[str, Interval]:
    """Accuracy whole, and with each head of the second layer silenced in turn.

    The head with the best induction score is called the induction head; the others may do some of that, too.
    """
    maps = model(test.inputs, want=["attention"]).aux["attention"][1]
    best = int(induction_score(maps, test.inputs).argmax())
    found = {"nothing silenced": scored([model], test)}
    for head in range(model.config.heads):
        with without_heads(model, [(1, head)]):
            found["induction head" if head == best else f"control: head {head}"] = scored([model], test)
    return found


def word_geometry(
    model: Transformer, untrained: Transformer, tokenizer: BPETokenizer, shards: Shards
) -> dict[str, Interval]:
    """Mean cosine of tokens to the others of their kind, beside two controls: tokens as frequent, and before training.

    The last two rows ask whether two spellings of one word are closer than the same tokens with partners exchanged.
    """
    counts = np.bincount(shards[:], minlength=tokenizer.vocab_size)
    raw = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    names = [i for i, word in enumerate(raw) if len(word) > 3 and word.isalpha() and word.isupper()]
    groups = {
        "digits": [i for i, word in enumerate(raw) if word.isdigit()],
        "speakers' names": [i for i in names if counts[i] > 20],
    }
    before, after = directions(untrained.embedding.weight), directions(model.embedding.weight)
    found = {}
    for name, group in groups.items():
        if len(group) > 1:  # a vocabulary of 512 has no names
            found[name] = mean_ci(cohesion(after, group).tolist())
            found[f"{name}: others as frequent"] = mean_ci(cohesion(after, like_in_frequency(group, counts)).tolist())
            found[f"{name}: untrained"] = mean_ci(cohesion(before, group).tolist())
    pairs = sorted(spelling_pairs(tokenizer), key=lambda pair: -min(counts[list(pair)]))[:100]
    strangers = [(pairs[i][0], pairs[i - 1][1]) for i in range(len(pairs))]
    found["two spellings of a word"] = mean_ci(pair_cosines(after, pairs).tolist())
    found["two spellings: partners exchanged"] = mean_ci(pair_cosines(after, strangers).tolist())
    return found


def neighbours(model: Transformer, tokenizer: BPETokenizer, names: Sequence[bytes], count: int = 6) -> str:
    """The nearest tokens of some, one line each."""
    unit, raw = directions(model.embedding.weight), [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    lines = []
    for token in (raw.index(name) for name in names if name in raw):
        near = "  ".join(f"{show_token(raw[i])} {cosine:.2f}" for i, cosine in nearest(unit, token, count))
        lines.append(f"{show_token(raw[token])}: {near}")
    return "\n".join(lines)
