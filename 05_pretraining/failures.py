"""May's failure gallery: trainings that run to their end, with a loss that falls, and are not what they say.

Every specimen is the year's trainer on a tiny model, with one part exchanged. Where the bug is in the middle of an update, a
short form of `Trainer.update` takes its place.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from common.data.documents import Batch, Document
from common.data.stream import BatchStream
from common.diagnostics.core import Failure, Specimen, replaced
from common.diagnostics.probes.training import known_tokens
from common.diagnostics.sources import MarkovSource
from common.evaluation.text import score_documents
from common.foundation.statistics import mean_ci
from common.generation.engine import Engine
from common.generation.sampling import SamplingParams
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.tokenization.protocol import END_OF_TEXT
from common.training import objectives, optimizers, snapshots
from common.training.checkpoint import load_tensors
from common.training.loss import Loss, bits, language_model_loss
from common.training.objectives import NextToken, PreparedTokens, Terms
from common.training.optimizers import AdamW, Optimizers
from common.training.schedules import Schedule
from common.training.snapshots import Snapshots
from common.training.trainer import Settings, Trainer, TrainingDiverged

MONTH = "05_pretraining"
RATE, WARMUP, DECAY = 4e-2, 8, 0.1
END = 16
CONFIG = ModelConfig(
    vocab_size=17, context_length=64, layers=1, width=16, heads=2, init="fan_in", tied=False, dropout=0.1
)
PLAIN = CONFIG.but(dropout=0.0)
SOURCE = MarkovSource()
TEXTS = SOURCE.texts(48, 600, seed=6)  # the first 40 to train on
LENGTHS = [1, 2, 3, 4, 2, 1, 5, 1, 3, 2, 1, 2, 6, 1, 2, 3, 0]  # bytes of each token, where bytes are asked for


class Letters:
    """A tokenizer of the source: the letters a to p are 0 to 15, then comes the end of a text."""

    vocab_size, specials, fingerprint = 17, {END_OF_TEXT: END}, "letters a to p"

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def encode_batch(self, texts: Sequence[str], **_: Any) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return b"".join(map(self.token_bytes, ids)).decode()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([ord("a") + token_id]) if token_id < END else b""


# --- the healthy training ---------------------------------------------------------------------------------------------


class Given:
    """A stream of these micro-batches."""

    epoch = 0

    def __init__(self, micro: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.batches = iter([Batch(*one, torch.ones_like(one[0])) for one in micro])

    def next_batch(self) -> Batch:
        return next(self.batches)


def stream_of(tokens: Sequence[int], length: int, rows: int) -> BatchStream:
    return BatchStream(tokens, length=length, batch_size=rows, end_of_text=END)


def trainer_of(
    model: nn.Module, stream: Any, updates: int = 12, settings: Settings | None = None, **more: Any
) -> Trainer:
    made = optimizers.make_optimizers(model, "adamw", learning_rate=RATE, weight_decay=DECAY)
    return Trainer(model, stream, made, Schedule(updates, WARMUP), settings or Settings(), **more)


def copied(model: nn.Module, config: ModelConfig) -> Transformer:
    made = Transformer(config)
    made.load_state_dict(model.state_dict())
    return made


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fitted(tokens: np.ndarray) -> tuple[Transformer, list[float]]:
    """A model trained for one epoch, and its losses."""
    model, stream = Transformer(PLAIN, seed=1), stream_of(tokens, 16, 16)
    made = trainer_of(model, stream, updates=stream.steps_per_epoch).train()
    return model, [row["loss"] for row in made.history]


Validate = Callable[[nn.Module, list[Batch]], float]


def nats_per_target(model: nn.Module, batches: list[Batch]) -> float:
    """Validation: all nats over all targets."""
    losses = [NextToken().loss(model, PreparedTokens(batch)) for batch in batches]
    return float(sum(loss.sum for loss in losses) / sum(loss.count for loss in losses))


def in_batches(rows: Tensor, size: int = 3) -> list[Batch]:
    """Rows (N, T + 1), the last batch smaller than the others."""
    whole = torch.ones_like(rows[:, :-1])
    return [Batch(*(t[i : i + size] for t in (rows[:, :-1], rows[:, 1:], whole.bool(), whole))) for i in
            range(0, len(rows), size)]  # fmt: skip


def training(updates: int, folder: Path | None) -> dict[str, Tensor]:
    """Twelve updates are planned, of two micro-batches each; an epoch is five batches."""
    stream, saving = stream_of(known_tokens(END, 80), 8, 2), {}
    if folder is not None:
        saving = {"snapshots": Snapshots(folder), "tokenizer": Letters()}
    model = Transformer(CONFIG, seed=1)
    return weights_of(trainer_of(model, stream, settings=Settings(accumulate=2), **saving).train(updates).model)


def update_on(model: nn.Module, micro: Sequence[tuple[Tensor, Tensor, Tensor]], clip: float | None = None) -> Trainer:
    """A trainer of a copy without dropout, about to make one update of these micro-batches."""
    settings = Settings(accumulate=len(micro), clip=clip)
    return trainer_of(copied(model, PLAIN), Given(micro), settings=settings, byte_lengths=torch.tensor(LENGTHS))


def at_each_step(made: Trainer, note: Callable[[], None]) -> Trainer:
    """Call `note` when the optimizers are about to step."""
    step = made.optimizers.step
    made.optimizers.step = lambda: (note(), step())
    return made


def gradients_of(model: nn.Module, micro: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    made, seen = update_on(model, micro), {}
    at_each_step(made, lambda: seen.update({n: p.grad.clone() for n, p in made.model.named_parameters()})).update()
    return seen


def rates(updates: int, accumulate: int) -> list[float]:
    made = trainer_of(
        Transformer(PLAIN), stream_of(known_tokens(END, 64), 8, 1), updates, Settings(accumulate=accumulate)
    )
    seen: list[float] = []
    at_each_step(made, lambda: seen.append(made.optimizers.groups[0]["lr"])).train()
    return seen


def poisoned_training() -> tuple[dict[str, Tensor], str]:
    """What the last norm gives in the third update is NaN."""
    made = trainer_of(Transformer(CONFIG, seed=1), stream_of(known_tokens(END, 160), 8, 2))
    made.model.final_norm.register_forward_hook(lambda _, __, out: out * torch.nan if made.done == 2 else out)
    try:
        made.train(6)
    except TrainingDiverged as error:
        return weights_of(made.model), str(error)
    return weights_of(made.model), ""


def numbered(number: int) -> Trainer:
    made = trainer_of(Transformer(CONFIG), stream_of(known_tokens(END, 64), 8, 2), tokenizer=Letters())
    made.done = number
    return made


def save_numbered(folder: Path, number: int) -> None:
    Snapshots(folder, keep=1).save(numbered(number))


def newest_number(folder: Path) -> int | None:
    with warnings.catch_warnings(action="ignore"):
        made = numbered(0)
        return made.done if Snapshots(folder).load_newest(made) else None


def load_weights(tensors: Mapping[str, Tensor]) -> nn.Module:
    made = Transformer(CONFIG)
    load_tensors(made, dict(tensors), "the file")
    return made


def batches(tokens: np.ndarray, length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in stream_of(tokens, length, 2).epoch_batches():
        yield batch.inputs, batch.targets, batch.loss_mask


def two_epochs() -> list[list[int]]:
    stream = stream_of(np.arange(400), 8, 2)
    return [[int(row) for batch in stream.epoch_batches() for row in batch.inputs[:, 0]] for _ in range(2)]


def resumed_batches(stops: list[int]) -> list[list[int]]:
    """An epoch is three batches."""
    made: list[list[int]] = []
    stream = stream_of(np.arange(48), 8, 2)
    for stop in stops:
        made += [stream.next_batch().inputs[:, 0].tolist() for _ in range(stop)]
        state, stream = stream.state_dict(), stream_of(np.arange(48), 8, 2)
        stream.load_state_dict(state)
    return made + [stream.next_batch().inputs[:, 0].tolist() for _ in range(12 - len(made))]


def split(texts: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """(training, held out): cut first, shuffled afterwards."""
    train, held = texts[:40], texts[40:]
    return [train[i] for i in rng.permutation(40)], held


def bits_per_byte(model: nn.Module, texts: list[str]) -> float:
    score = score_documents(model, Letters(), [Document(str(i), "text", text) for i, text in enumerate(texts)])
    return bits(sum(score.nats)) / sum(score.bytes)


def room(validate: Validate = nats_per_target) -> Specimen:
    """A training and what is around it, with whatever `common` is at this moment."""
    torch.manual_seed(0)
    known = known_tokens(17)
    model, known_losses = fitted(known)
    module, engine = copied(model, CONFIG).eval(), Engine(model, Letters())
    train_texts, heldout_texts = split(TEXTS, np.random.default_rng(0))

    def losses(tokens: np.ndarray) -> list[float]:
        return known_losses if np.array_equal(tokens, known) else fitted(tokens)[1]

    def generate(prompts: list[str], seed: int) -> list[str]:
        params = SamplingParams(max_tokens=14, seed=seed)
        return [row[0].text for row in engine.generate([engine.encode(prompt) for prompt in prompts], params)]

    def validation_loss(rows: Tensor) -> float:
        twin = copied(module, CONFIG).train()  # as after an update
        evaluate = lambda model, _: {"loss": validate(model, in_batches(rows))}  # noqa: E731
        return trainer_of(twin, Given([]), evaluate=evaluate).train(0).evaluations[-1]["loss"]

    def evaluated(every: int | None) -> dict[str, Tensor]:
        held = in_batches(torch.from_numpy(known_tokens(END, 108)[:108]).view(12, 9))
        watching = {"evaluate": lambda model, _: {"loss": validate(model, held)}} if every else {}
        stream, settings = stream_of(known_tokens(END, 160), 8, 2), Settings(evaluate_every=every)
        return weights_of(trainer_of(Transformer(CONFIG, seed=1), stream, settings=settings, **watching).train(6).model)

    return {
        "model": model,
        "module": module,
        "vocab_size": 17,
        "train_texts": train_texts,
        "heldout_texts": heldout_texts,
        "bits_per_byte": bits_per_byte,
        "generate": generate,
        "batches": batches,
        "two_epochs": two_epochs,
        "resumed_batches": resumed_batches,
        "losses": losses,
        "training_loss": lambda micro: update_on(module, micro).update()["loss"],
        "training_bits_per_byte": lambda micro: update_on(module, micro).update()["bits_per_byte"],
        "token_length": LENGTHS.__getitem__,
        "gradients": lambda micro: gradients_of(module, micro),
        "gradient_norm": lambda micro: update_on(module, micro).update()["gradient_norm"],
        "validation_loss": validation_loss,
        "evaluated": evaluated,
        "training": training,
        "poisoned_training": poisoned_training,
        "rates": rates,
        "warmup": WARMUP,
        "top_rate": RATE,
        "make_optimizer": lambda net: optimizers.make_optimizers(net, "adamw", learning_rate=RATE, weight_decay=DECAY),
        "optimizer_settings": {"lr": RATE, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": DECAY},
        "load_weights": load_weights,
    }


def room_with_looks() -> Specimen:
    """With the untrained model as well, for what everybody tries first."""
    return {**room(), "untrained": Transformer(PLAIN)}


def room_with_saves() -> Specimen:
    return {**room(), "save_numbered": save_numbered, "newest_number": newest_number}


def healthy() -> Specimen:
    return {**room_with_saves(), "untrained": Transformer(PLAIN)}


BITS, PARITY_UPDATES = 12, 25


def parity_weights(seed: int, updates: int = PARITY_UPDATES) -> dict[str, Tensor]:
    """A hidden layer learns the product of two of twelve signs by plain descent, in double precision.

    No sign alone says anything about the product, as no last digit alone says anything about that of a sum. After so few
    updates a training is in the middle of finding out.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "hidden": torch.randn(48, BITS, generator=generator, dtype=torch.float64) / BITS**0.5,
        "bias": torch.zeros(48, dtype=torch.float64),
        "output": torch.randn(48, generator=generator, dtype=torch.float64) / 48**0.5,
    }
    for _ in range(updates):
        signs, product = parity_batch(32, generator)
        weights = {name: p.requires_grad_() for name, p in weights.items()}
        loss = nn.functional.softplus(-product * parity_output(weights, signs)).mean()
        slopes = torch.autograd.grad(loss, list(weights.values()))
        weights = {name: (p - 0.3 * g).detach() for (name, p), g in zip(weights.items(), slopes, strict=True)}
    return weights


def parity_batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    signs = 2.0 * torch.randint(0, 2, (rows, BITS), generator=generator).double() - 1
    return signs, signs[:, 0] * signs[:, 1]


def parity_output(weights: Mapping[str, Tensor], signs: Tensor) -> Tensor:
    return (signs @ weights["hidden"].mT + weights["bias"]).relu() @ weights["output"]


def parity_answers(seed: int) -> list[float]:
    """1.0 for each of 1,000 questions that the training with this seed gets right."""
    signs, product = parity_batch(1000, torch.Generator().manual_seed(10**6))
    return (parity_output(parity_weights(seed), signs) * product > 0).double().tolist()


def parity_rate(seed: int) -> float:
    return float(np.mean(parity_answers(seed)))


def parity_trainings() -> Specimen:
    """The range over six trainings is printed."""
    rates = [parity_rate(seed) for seed in range(6)]
    return {
        "trained_rate": parity_rate,
        "printed_interval": lambda: (min(rates), max(rates)),
        "training": lambda updates, folder: parity_weights(0, updates),
    }


# --- the bugs ---------------------------------------------------------------------------------------------------------


@contextmanager
def several(*changes: tuple[Any, str, Any]) -> Iterator[Specimen]:
    """A specimen while several things are something else."""
    with ExitStack() as stack:
        for what, name, by in changes:
            stack.enter_context(patch.object(what, name, by))
        yield room()


right_loss, right_update, right_cosine = NextToken.loss, Trainer.update, Schedule.__call__
right_evaluate, right_order, right_load = Trainer._evaluate, BatchStream._order_of, BatchStream.load_state_dict
right_save, right_make = Snapshots.save, optimizers.make_optimizers


def updates_by(
    share: Callable[[Trainer, Terms, list[Batch]], Tensor], *, zero: bool = False, mode: bool = True
) -> Callable:
    """`Trainer.update` in short, where `share` is what a micro-batch gives to the backward pass.

    With `whole_share` it is the right one.
    """

    def update(self: Trainer) -> dict[str, float]:
        if mode:
            self.model.train()
        self._seed()
        rate = self.schedule(self.done)
        self.optimizers.set_rate(rate)
        window = [self.stream.next_batch() for _ in range(self.settings.accumulate)]
        nats, targets = 0.0, sum(int(batch.loss_mask.sum()) for batch in window)
        for batch in window:
            if zero:
                self.optimizers.zero_grad()
            loss = NextToken().loss(self.model, PreparedTokens(batch))
            share(self, loss, window).backward()
            nats += float(loss.sum.detach())
        norm = self.clip_gradients()
        if not np.isfinite(norm):
            raise TrainingDiverged(f"update {self.done}: gradient norm {norm}")
        self.optimizers.step()
        self.optimizers.zero_grad()
        self.done += 1
        row = {"step": self.done, "loss": nats / targets, "gradient_norm": norm, "rate": rate, "targets": targets}
        if self.byte_lengths is not None:
            size = sum(int(self.byte_lengths[batch.targets[batch.loss_mask]].sum()) for batch in window)
            row["bits_per_byte"] = bits(nats) / size
        self.history.append(row)
        return row

    return update


def whole_share(self: Trainer, loss: Terms, window: list[Batch]) -> Tensor:
    return loss.sum / sum(int(batch.loss_mask.sum()) for batch in window)


def with_update(update: Callable, make: Callable[[], Specimen] = room) -> Iterator[Specimen]:
    return replaced(Trainer, "update", update, make)


def mean_of_means() -> Iterator[Specimen]:
    return with_update(updates_by(lambda self, loss, window: loss.mean / len(window)), room_with_looks)


def undivided() -> Iterator[Specimen]:
    return with_update(
        updates_by(lambda self, loss, window: whole_share(self, loss, window) * len(window)), room_with_looks
    )


def partial_window() -> Iterator[Specimen]:
    """Windows of four are configured, and the last of an epoch may have fewer; one alone is no accumulation."""

    def share(self: Trainer, loss: Terms, window: list[Batch]) -> Tensor:
        configured = 4 if 1 < len(window) < 4 else len(window)
        return whole_share(self, loss, window) * len(window) / configured

    return with_update(updates_by(share))


def zeroed_between() -> Iterator[Specimen]:
    return with_update(updates_by(whole_share, zero=True), room_with_looks)


def chunk_means() -> Iterator[Specimen]:
    def wrong(hidden: Tensor, head: Tensor, targets: Tensor, mask: Tensor, **_: Any) -> Loss:
        right = language_model_loss(hidden @ head.mT, targets, mask)
        mean = right.sum / mask.numel()  # the masked positions are zero, and counted
        return Loss(mean * right.count, right.count, mean)

    return replaced(objectives, "chunked_language_model_loss", wrong, room)


def logged_with(change: Callable[[Trainer, dict[str, float]], dict[str, float]]) -> Iterator[Specimen]:
    def wrong(self: Trainer) -> dict[str, float]:
        row = right_update(self)
        row.update(change(self, row))
        return row

    return with_update(wrong)


def scaled_twice() -> Iterator[Specimen]:
    return logged_with(lambda self, row: {"loss": row["loss"] / self.settings.accumulate})


def bits_per_token() -> Iterator[Specimen]:
    return logged_with(lambda self, row: {"bits_per_byte": bits(row["loss"])})


def zero_warmup() -> Iterator[Specimen]:
    """step / warmup in place of (step + 1) / warmup."""

    def wrong(self: Schedule, step: int) -> float:
        return right_cosine(self, step) * min(1.0, step / (step + 1) if step < self.warmup else 1.0)

    return replaced(Schedule, "__call__", wrong, room)


def rate_not_passed() -> Iterator[Specimen]:
    """The optimizer is made with its default."""

    def wrong(model: nn.Module, kind: str, *, learning_rate: float, **more: Any) -> Optimizers:
        return right_make(model, kind, learning_rate=1e-3, **more)

    return replaced(optimizers, "make_optimizers", wrong, room)


def stepped_per_micro_batch() -> Iterator[Specimen]:
    def wrong(self: Trainer) -> dict[str, float]:
        schedule, each = self.schedule, self.settings.accumulate
        with patch.object(self, "schedule", lambda done: schedule(done * each)):
            return right_update(self)

    return with_update(wrong)


def unshifted_validation() -> Specimen:
    return room(lambda model, held: nats_per_target(model, [replace(batch, targets=batch.inputs) for batch in held]))


def running_mean() -> Specimen:
    """The running sum is divided in each pass of the loop."""

    def wrong(model: nn.Module, held: list[Batch]) -> float:
        total = 0.0
        for number, batch in enumerate(held, 1):
            total = (total + nats_per_target(model, [batch])) / number
        return total

    return room(wrong)


def no_evaluation_mode(self: Trainer) -> None:
    with patch.object(self.model, "eval", lambda: self.model):
        right_evaluate(self)


def evaluation_in_training_mode() -> Iterator[Specimen]:
    return replaced(Trainer, "_evaluate", no_evaluation_mode, room)


def stays_in_evaluation_mode() -> Iterator[Specimen]:
    return with_update(updates_by(whole_share, mode=False))


def losses_left_over() -> Iterator[Specimen]:
    """Losses wait in a buffer for the next backward pass, and validation puts its own there."""
    waiting: list[Tensor] = []

    def wrong(self: NextToken, model: nn.Module, prepared: PreparedTokens) -> Terms:
        terms = right_loss(self, model, prepared)
        waiting.append(terms.sum)
        return terms._replace(sum=terms.sum.detach())

    def share(self: Trainer, loss: Terms, window: list[Batch]) -> Tensor:
        whole = sum(waiting) / sum(int(batch.loss_mask.sum()) for batch in window)
        waiting.clear()
        return whole

    def evaluate(self: Trainer) -> None:
        with patch.object(torch, "no_grad", torch.enable_grad):
            right_evaluate(self)

    return several((NextToken, "loss", wrong), (Trainer, "update", updates_by(share)), (Trainer, "_evaluate", evaluate))


def unshifted_targets() -> Iterator[Specimen]:
    """The loader is right; what is handed to the loss is not, in training and validation alike."""

    def wrong(self: NextToken, model: nn.Module, prepared: PreparedTokens) -> Terms:
        return right_loss(self, model, PreparedTokens(replace(prepared.batch, targets=prepared.batch.inputs)))

    return replaced(NextToken, "loss", wrong, room_with_looks)


def shifted_twice() -> Iterator[Specimen]:
    """Shifted by the loader and by the loss once more, which leaves one target less in a row."""

    def wrong(self: NextToken, model: nn.Module, prepared: PreparedTokens) -> Terms:
        batch, count = prepared.batch, prepared.batch.loss_mask.sum()
        first = torch.arange(batch.targets.shape[1]) < batch.targets.shape[1] - 1
        again = replace(batch, targets=batch.targets.roll(-1, dims=1), loss_mask=batch.loss_mask & first)
        terms = right_loss(self, model, PreparedTokens(again))
        return terms._replace(sum=terms.mean * count, count=count)

    return replaced(NextToken, "loss", wrong, room_with_looks)


def same_order() -> Iterator[Specimen]:
    return replaced(BatchStream, "_order_of", lambda self, epoch: right_order(self, 0), room)


def seed_zero() -> Iterator[Specimen]:
    """`if seed:`, and 0 is the default. A counter stands for the entropy of the machine."""
    entropy = itertools.count(1)

    def wrong(self: BatchStream, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch) if self.seed else next(entropy)).permutation(self.rows)

    return replaced(BatchStream, "_order_of", wrong, room)


def split_after_shuffling() -> Specimen:
    train = [TEXTS[i] for i in np.random.default_rng(0).permutation(48)][:40]
    return {**room(), "train_texts": train, "heldout_texts": TEXTS[40:]}


def decayed_norms() -> Iterator[Specimen]:
    return replaced(optimizers, "kind_of", lambda name, parameter: "hidden", room)


def two_optimizers() -> Iterator[Specimen]:
    """The other copy still adds the decay to the gradient."""
    right = AdamW.step

    def wrong(self: AdamW) -> None:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad + group["weight_decay"] * p.detach()
            group["weight_decay"] = 0.0
        right(self)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    return replaced(AdamW, "step", wrong, room)


def thawed_too_late() -> Iterator[Specimen]:
    """The last norm was frozen when the optimizer was made."""

    def wrong(model: nn.Module, *arguments: Any, **more: Any) -> Optimizers:
        frozen = getattr(model, "final_norm", None)
        if frozen is None:
            return right_make(model, *arguments, **more)
        frozen.requires_grad_(False)
        made = right_make(model, *arguments, **more)
        frozen.requires_grad_(True)
        return made

    return replaced(optimizers, "make_optimizers", wrong, room)


def compiled_names() -> Specimen:
    def load_leniently(tensors: Mapping[str, Tensor]) -> nn.Module:
        made = Transformer(CONFIG)
        made.load_state_dict(tensors, strict=False)
        return made

    return {**room(), "load_weights": load_leniently}


def deleted_before_written() -> Iterator[Specimen]:
    def wrong(self: Snapshots, made: Trainer) -> Path:
        for old in self.all()[self.keep - 1 :]:
            snapshots.shutil.rmtree(old)
        return right_save(self, made)

    return replaced(Snapshots, "save", wrong, room_with_saves)


def epoch_not_saved() -> Iterator[Specimen]:
    def wrong(self: BatchStream, state: dict[str, Any]) -> None:
        right_load(self, {**state, "epoch": 0})

    return replaced(BatchStream, "load_state_dict", wrong, room)


def moments_not_loaded() -> Iterator[Specimen]:
    return several(
        (Optimizers, "load", lambda self, tensors: None), (Optimizers, "load_counters", lambda self, counters: None)
    )


def dropout_restarts() -> Iterator[Specimen]:
    """The generator is set when a process begins, and its state is in no snapshot."""

    def wrong(self: Trainer) -> None:
        if not hasattr(self, "begun"):
            self.begun = True
            torch.manual_seed(self.settings.seed)

    return replaced(Trainer, "_seed", wrong, room)


def skipped_nan() -> Iterator[Specimen]:
    def wrong(self: Trainer) -> dict[str, float]:
        try:
            return right_update(self)
        except TrainingDiverged:
            self.done += 1
            return self.history[-1]

    return with_update(wrong)


# --- the entries ------------------------------------------------------------------------------------------------------


def one_seed() -> Specimen:
    """One training, and the interval over its questions."""
    value = mean_ci(parity_answers(0))
    return {**parity_trainings(), "printed_interval": lambda: (value.low, value.high)}


LOOKS = ("loss-falls", "beats-unigram", "samples-look-right", "repeatable", "shapes-and-ranges")
AT_FIRST = ("loss-at-init", "overfit-one-batch", *LOOKS)
RUNS = ("run-twice", "bitwise-resume")
Entry = partial(Failure, month=MONTH, healthy=healthy)

FAILURES = [
    Entry(
        id="pretraining/mean-of-means",
        title="Accumulation averages means of unequal batches",
        story="Each micro-batch divides by its own number of targets, and the means are averaged. A micro-batch with "
        "one target then weighs as much as one with sixteen. With rows of one length nothing shows, and in the "
        "thread curves of fixed-length blocks nearly agreed.",
        source="huggingface/transformers#34191",
        symptom="another loss than with the full batch, only where rows are padded or masked",
        fix="Count the targets of the whole update first, and divide each sum by that.",
        broken=mean_of_means,
        probe="gradient-equivalence",
        blind_spots=("accumulation-invariance", "honest-log", "known-entropy", *AT_FIRST, *RUNS),
    ),
    Entry(
        id="pretraining/undivided-accumulation",
        title="The loss is not divided by the number of micro-batches",
        story="Gradients add up to a multiple of what they should be. AdamW divides by their usual size, so the "
        "training looks the same; only the clipping, whose limit is now effectively lower, is another one.",
        source="karpathy/nanoGPT#168",
        symptom="the gradient norm grows with the accumulation",
        fix="Divide before the backward pass.",
        broken=undivided,
        probe="accumulation-invariance",
        blind_spots=("honest-log", "known-entropy", *AT_FIRST, *RUNS),
    ),
    Entry(
        id="pretraining/partial-window",
        title="The last window of an epoch is divided by a full one",
        story="Four micro-batches are configured, and the epoch ends after two: the loss is still divided by four. The "
        "gradient of that update is half of what it should be.",
        source="modelscope/ms-swift#10084",
        symptom="none in a curve",
        fix="Divide by what is in the window.",
        broken=partial_window,
        probe="gradient-equivalence",
        blind_spots=("honest-log", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/zeroed-between",
        title="Gradients are cleared between micro-batches",
        story="zero_grad stands in the loop over micro-batches, so the optimizer gets the last one alone, still divided "
        "by their number. The cost of accumulation is paid, and there is none.",
        source="pytorch/torchtitan#3575, allenai/open-instruct#1498",
        symptom="noisier than the batch size promises",
        fix="Clear after the step, and only there.",
        broken=zeroed_between,
        probe="gradient-equivalence",
        blind_spots=("honest-log", "known-entropy", *AT_FIRST, *RUNS),
    ),
    Entry(
        id="pretraining/chunk-mean",
        title="The chunked loss divides by masked positions, too",
        story="The loss is computed in chunks, and their mean is taken over all positions, those included that do not "
        "count. It comes out too low, the more so the more is masked.",
        source="Lightning-AI/litgpt#751",
        symptom="a better loss for longer prompts",
        fix="Divide by the targets that count; compare with the plain form on a ragged mask.",
        broken=chunk_means,
        probe="gradient-equivalence",
        blind_spots=("accumulation-invariance", "same-batch", "honest-evaluator", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/scaled-twice",
        title="The logged loss is divided twice",
        story="The loss is divided for the backward pass, and what is logged is divided by the number of micro-batches "
        "again. Here training is right; the curve of a run with smaller micro-batches is lower by that factor.",
        source="verl-project/verl#4711",
        symptom="runs that differ in the size of their micro-batches cannot be compared",
        fix="Log sums over counts.",
        broken=scaled_twice,
        probe="honest-log",
        blind_spots=("gradient-equivalence", "accumulation-invariance", "same-batch", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/bits-per-token",
        title="Bits per byte that are bits per token",
        story="Nats per target become bits per target and are called bits per byte. With a tokenizer of bytes it is the "
        "same number; with any other it is several times too high, and no larger vocabulary looks worth it. A "
        "relative in print: bits per character that were bits per byte.",
        source="ours; the relative is facebookresearch/adaptive-span#17",
        symptom="a tokenizer with more merges looks worse",
        fix="Divide the nats by the bytes of the same targets.",
        broken=bits_per_token,
        probe="bits-from-bytes",
        blind_spots=("honest-log", "gradient-equivalence", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/unshifted-validation",
        title="Validation compares a token with itself",
        story="Training shifts logits and targets, the validation loop hands them over as they are. In the thread the "
        "validation loss was above 10 a few steps in, with a training loss below 2.",
        source="Lightning-AI/litgpt#407",
        symptom="validation far above training, from the beginning",
        fix="One function for both; ask both about the same rows.",
        broken=unshifted_validation,
        probe="same-batch",
        blind_spots=("evaluated-twice", "evaluation-changes-nothing", "known-entropy", *LOOKS),
    ),
    Entry(
        id="pretraining/running-mean",
        title="The running evaluation loss is divided on every pass",
        story="A sum over batches is divided by the number of batches so far inside the loop that adds to it. What is "
        "left is little more than the last batch over the number of batches, so more validation text gives a "
        "better number.",
        source="lucidrains/reformer-pytorch#147",
        symptom="a validation loss that improves with the amount of text",
        fix="Divide once, after the loop.",
        broken=running_mean,
        probe="honest-evaluator",
        blind_spots=("evaluated-twice", "evaluation-changes-nothing", "known-entropy", *LOOKS),
    ),
    Entry(
        id="pretraining/evaluation-in-training-mode",
        title="Dropout stays on during validation",
        story="In nanoGPT's case eval() was called, but attention went through a function that took the rate of dropout "
        "as an argument and never heard of it. Here the mode is not changed at all.",
        source="karpathy/nanoGPT#240",
        symptom="a validation loss a little too high, and not the same twice",
        fix="Hand the mode on to every function that drops; ask twice.",
        broken=evaluation_in_training_mode,
        probe="evaluated-twice",
        blind_spots=("evaluation-changes-nothing", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/stays-in-evaluation-mode",
        title="The model never goes back to training mode",
        story="Validation calls eval(), and nothing calls train() afterwards. From the first evaluation on there is no "
        "dropout, so how a model is trained depends on when it is looked at.",
        source="fartashf/vsepp#4",
        symptom="the result depends on how often it is evaluated",
        fix="train() at the beginning of each update, not of each run.",
        broken=stays_in_evaluation_mode,
        probe="evaluation-changes-nothing",
        blind_spots=("evaluated-twice", "honest-evaluator", "same-batch", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/losses-left-over",
        title="Validation leaves its losses in the buffer of training",
        story="Losses wait in a buffer until the next backward pass, and validation fills the same buffer. The update "
        "after each validation adds to what it finds there: in the thread the loss spikes, here the model learns "
        "from the validation text as well.",
        source="karpathy/llm.c#661",
        symptom="something periodic, with the period of the evaluation",
        fix="Clear the buffer, and compute no gradients in validation.",
        broken=losses_left_over,
        probe="evaluation-changes-nothing",
        blind_spots=("evaluated-twice", "honest-evaluator", "gradient-equivalence", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/unshifted-targets",
        title="The targets are the inputs",
        story="Labels equal inputs, on the belief that the model shifts them; this one does not. It learns to copy: in "
        "the report the loss went from 8.6 to 0.0000 without a word.",
        source="KempnerInstitute/KempnerForge#154, huggingface/transformers#27517",
        symptom="the best training loss of all; samples repeat one token",
        fix="Say who shifts; train on a source whose entropy is known.",
        broken=unshifted_targets,
        probe="known-entropy",
        blind_spots=(
            "loss-falls",
            "same-batch",
            "shapes-and-ranges",
            "pair-coverage",
            "loss-at-init",
            "overfit-one-batch",
            *RUNS,
        ),
    ),
    Entry(
        id="pretraining/shifted-twice",
        title="The targets are shifted twice",
        story="The caller shifts, and the loss function shifts again: the model learns the token after the next. The "
        "loss falls, to a floor that is too high.",
        source="huggingface/transformers#37830",
        symptom="a loss that falls as usual, and stops too high",
        fix="Shift in one place; compare with the entropy of a known source.",
        broken=shifted_twice,
        probe="known-entropy",
        blind_spots=(
            "loss-falls",
            "same-batch",
            "shapes-and-ranges",
            "pair-coverage",
            "loss-at-init",
            "overfit-one-batch",
            *RUNS,
        ),
    ),
    Entry(
        id="pretraining/zero-warmup",
        title="The warm-up begins with a rate of zero",
        story="The rate is step / warmup, and the first step is number 0. One batch is computed for nothing, and the "
        "checkpoint of step 1 equals that of step 0, as in every Pythia model on the hub.",
        source="karpathy/nanoGPT#443, EleutherAI/gpt-neox#1373",
        symptom="harmless, until one debugs a single step",
        fix="(step + 1) / warmup.",
        broken=zero_warmup,
        probe="every-update-moves",
        blind_spots=("optimizer-reference", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/rate-not-passed",
        title="The learning rate never reaches the optimizer",
        story="The schedule reads the top rate back from the optimizer, which was made with its default. The curve has "
        "the right shape at another height: in the notebook 1e-3 in place of 5e-4, here in place of 4e-2.",
        source="rasbt/LLMs-from-scratch#427",
        symptom="changing the learning rate changes nothing",
        fix="Compare the rates in use with those in the config, as numbers.",
        broken=rate_not_passed,
        probe="schedule-shape",
        blind_spots=(
            "loss-falls",
            "samples-look-right",
            "repeatable",
            "shapes-and-ranges",
            "every-update-moves",
            *RUNS,
        ),
    ),
    Entry(
        id="pretraining/schedule-per-micro-batch",
        title="The schedule counts micro-batches",
        story="The scheduler steps after each backward pass. With an accumulation of 16 a warm-up of 16,000 steps "
        "lasted 1,000 updates and the training was unstable; without accumulation there is nothing to see.",
        source="Lightning-AI/pytorch-lightning#1476",
        symptom="the rate is at its floor long before the end",
        fix="Count updates.",
        broken=stepped_per_micro_batch,
        probe="schedule-shape",
        blind_spots=("every-update-moves", "optimizer-reference", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/decayed-norms",
        title="Weight decay on norms and biases",
        story="All parameters are in one group. The weights of norms, which belong near 1, are pulled towards 0. The "
        "thread measures no damage, and in a short run neither does the loss here.",
        source="Lightning-AI/lit-llama#254",
        symptom="none in a short run",
        fix="Group by what a parameter is; look at which ones a zero gradient moves.",
        broken=decayed_norms,
        probe="unused-decay",
        blind_spots=("optimizer-reference", "every-update-moves", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/two-optimizers",
        title="Two implementations of one optimizer have drifted apart",
        story="One for a single process, one for several; the decay was taken out of the gradient in the first alone. "
        "Each of them trains, and nobody compares them.",
        source="ours",
        symptom="runs on one machine and on two differ a little",
        fix="One implementation, and a test against another library's.",
        broken=two_optimizers,
        probe="optimizer-reference",
        blind_spots=("unused-decay", "every-update-moves", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/thawed-too-late",
        title="A parameter that no optimizer knows",
        story="A part is frozen while the optimizer is made and thawed afterwards. It never moves, and as no optimizer "
        "clears its gradients they add up from update to update, in the norm that is clipped as well.",
        source="ours",
        symptom="a gradient norm a little too large",
        fix="Account for every parameter when the optimizer is made; look for those that do not move.",
        broken=thawed_too_late,
        probe="every-update-moves",
        blind_spots=(
            "parameters-move",
            "gradient-equivalence",
            "optimizer-reference",
            "known-entropy",
            "run-twice",
            *LOOKS,
        ),
    ),
    Entry(
        id="pretraining/same-order",
        title="Every epoch has the order of the first",
        story="The sampler's order is a function of seed and epoch, and nobody tells it the epoch. With shuffle=True "
        "every epoch is the same sequence of batches.",
        source="pytorch/pytorch#31771",
        symptom="none in the loss here",
        fix="Draw the order from (seed, epoch).",
        broken=same_order,
        probe="epochs-differ",
        blind_spots=("pair-coverage", "exact-resume", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/seed-zero",
        title="A seed of 0 is no seed",
        story="The code asks `if seed:`, and 0 is the default. Nothing is reproducible until somebody chooses another "
        "number.",
        source="ml-explore/mlx-lm#1661",
        symptom="two runs of one command differ",
        fix="`if seed is not None`, or always seed; run twice and compare bits.",
        broken=seed_zero,
        probe="run-twice",
        blind_spots=("pair-coverage", "epochs-differ", "known-entropy", *LOOKS),
    ),
    Entry(
        id="pretraining/split-after-shuffling",
        title="Validation text is in the training text",
        story="Training is shuffled and then cut, validation is cut from what was not shuffled. Some texts are in both; "
        "here three quarters of the validation text are.",
        source="marin-community/marin#2700",
        symptom="a small gap between training and validation",
        fix="Split, then shuffle; look for spans of one text in the other.",
        broken=split_after_shuffling,
        probe="overlap",
        blind_spots=("honest-evaluator", "same-batch", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/compiled-names",
        title="Names of a compiled model, loaded without a word",
        story="torch.compile puts _orig_mod. before every saved name. Strict loading stops there, as in the thread; "
        "with strict=False, which is ours to add, nothing is loaded and nothing is said.",
        source="karpathy/nanoGPT#325",
        symptom="fine-tuning starts at the loss of a random model",
        fix="Save the names of the model inside; load strictly.",
        broken=compiled_names,
        probe="strict-load",
        blind_spots=("weights-survive", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/delete-before-write",
        title="The old checkpoint is deleted before the new one is there",
        story="One checkpoint is to be kept, and room is made first. A save that fails, by a full disk or a kill, "
        "leaves none.",
        source="verl-project/verl#4873",
        symptom="none, until the one save that fails",
        fix="Write beside it, rename, then delete.",
        broken=deleted_before_written,
        probe="kill-during-save",
        blind_spots=(*LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/epoch-not-saved",
        title="A resumed loader is back in the first epoch",
        story="The state has the position within an epoch, and not which epoch. A resume in the first epoch is right; "
        "in a later one the order of epoch 0 is dealt out again.",
        source="verl-project/verl#4156, huggingface/accelerate#4071",
        symptom="runs that were interrupted late are not reproducible",
        fix="Save both; test a resume beyond the first epoch.",
        broken=epoch_not_saved,
        probe="bitwise-resume",
        blind_spots=("epochs-differ", "run-twice", "known-entropy", *LOOKS),
    ),
    Entry(
        id="pretraining/optimizer-not-loaded",
        title="A resume starts with fresh moments",
        story="A new AdamW has no state until its first step, so the loader finds nothing to fill and the saved moments "
        "are dropped silently. In an older form the state was loaded, and a constructor wiped it.",
        source="KempnerInstitute/KempnerForge#115, OpenNMT/OpenNMT-py#617",
        symptom="a resumed run is another run",
        fix="Make the state before loading it, strictly; compare with an undisturbed run.",
        broken=moments_not_loaded,
        probe="bitwise-resume",
        blind_spots=("exact-resume", "run-twice", "optimizer-reference", "known-entropy", *LOOKS),
    ),
    Entry(
        id="pretraining/dropout-restarts",
        title="A resumed training repeats its dropout",
        story="The generator is set when a process begins, and its state is in no checkpoint. After each resume the "
        "same units are dropped again in the same order.",
        source="ours",
        symptom="none; two runs differ that should be one",
        fix="Save the generator's state, or draw dropout from the number of the update.",
        broken=dropout_restarts,
        probe="bitwise-resume",
        blind_spots=("exact-resume", "run-twice", "evaluation-changes-nothing", "known-entropy", *LOOKS),
    ),
    Entry(
        id="pretraining/skipped-nan",
        title="A loss that is not a number is skipped without a word",
        story="An update whose loss or gradient is NaN is left out and counted, and the curve closes over the gap. What "
        "caused it, a broken row or a rate too high, is met again.",
        source="ours",
        symptom="a smooth curve with fewer updates than it says",
        fix="Stop, and name the update, the batch and the first module that went wrong.",
        broken=skipped_nan,
        probe="finite-state",
        blind_spots=("parameters-move", "known-entropy", *LOOKS, *RUNS),
    ),
    Entry(
        id="pretraining/one-seed",
        title="The ability that one seed has",
        story="A skill without a first step, such as the last digit of a sum, is at chance for a long time and then jumps. "
        "Where the training ends near the jump, the seed or the processor decides whether the model has it. Our base model "
        "could add on one machine, with an interval of a tenth over sixty questions; on another, the same commit and seed "
        "could not.",
        source="ours, issue of May's base model",
        symptom="none, until somebody else trains it",
        fix="Train several times and print the spread over trainings; move the jump away from the end of the training.",
        broken=one_seed,
        healthy=parity_trainings,
        probe="spread-over-trainings",
        blind_spots=("run-twice",),
    ),
]
