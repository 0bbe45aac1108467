"""Probes of anybody's training: accumulation, what is logged, evaluation, the schedule, the optimizer, saving and resuming.

Each asks for callables that a few lines around any loop can give, and does its own arithmetic: the loss is torch's
`cross_entropy` on the full batch, the optimizer torch's AdamW in doubles. A micro-batch is (inputs (B, T), targets (B, T),
mask (B, T)); nats per target are summed over all targets that count and divided once.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.diagnostics.core import Reading, probe
from common.diagnostics.probes.models import bare
from common.diagnostics.sources import MarkovSource

MicroBatch = tuple[Tensor, Tensor, Tensor]


def micro_batches(vocab_size: int, counts: Sequence[int] = (16, 9, 4, 1)) -> list[MicroBatch]:
    """Two rows of eight places each, of which the first `counts[i]` count."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab_size, (len(counts), 2, 9), generator=generator)
    return [(r[:, :-1], r[:, 1:], (torch.arange(16) < n).view(2, 8)) for r, n in zip(rows, counts, strict=True)]


def nats(module: nn.Module, micro: Sequence[MicroBatch]) -> Tensor:
    """Nats per target of the module, in evaluation mode, on all micro-batches as one batch."""
    inputs, targets, mask = (torch.cat(part) for part in zip(*micro, strict=True))
    return F.cross_entropy(bare(module(inputs))[mask].float(), targets[mask])


def own_nats(module: nn.Module, micro: Sequence[MicroBatch]) -> float:
    with torch.no_grad():
        return float(nats(copy.deepcopy(module).eval(), micro))


def known_tokens(vocab_size: int, count: int = 32_768) -> np.ndarray:
    """Eight texts of a source of known entropy rate as one stream of ids from 0 to 15: a token a symbol.

    As many as a tiny model needs to learn the source well: after a third of them a model that was taught the wrong thing is
    still so near to knowing nothing that the last digit decides which side of a threshold it is on.
    """
    text = "".join(MarkovSource().texts(8, count // 8 + 1, seed=5))[: count + 1]
    return (np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - ord("a")) % vocab_size


def differing(these: Mapping[str, Tensor], those: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bit for bit."""
    return [n for n in sorted({*these, *those}) if n not in these or n not in those or not these[n].equal(those[n])]


def worst(values: Iterable[float]) -> float:
    """The largest, or NaN if there is one: `max` may lose it."""
    return float(np.max(list(values)))


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "") if names else "none"


# --- the loss that is reported ----------------------------------------------------------------------------------------


@probe("loss-falls", "does the reported training loss fall?")
def loss_falls(losses: Callable, vocab_size: int, *, least: float = 0.9) -> Reading:
    """The look that everybody takes: the last tenth of the losses against the first one. Nearly every bug passes."""
    found = list(losses(known_tokens(vocab_size)))
    return Reading(
        float(np.mean(found[-max(1, len(found) // 10) :])) / found[0], least, "last losses as a share of the first"
    )


@probe("known-entropy", "does the training loss end where the entropy of the text is?")
def known_entropy(losses: Callable, vocab_size: int, *, below: float = 0.12, above: float = 0.3) -> Reading:
    """One epoch of a source of known entropy rate: below it is impossible, far above it something was not learned.

    The value is the distance in units of what is allowed on that side; `above` leaves room for a small model.
    """
    rate = MarkovSource().entropy_rate * math.log(2)
    found = list(losses(known_tokens(vocab_size)))
    end = float(np.mean(found[-max(1, len(found) // 5) :]))
    return Reading(
        max((rate - end) / below, (end - rate) / above), 1.0, f"ends at {end:.3f}, entropy rate {rate:.3f} nats"
    )


@probe("honest-log", "is the logged loss that of the whole update?")
def honest_log(training_loss: Callable, module: nn.Module, vocab_size: int, *, tolerance: float = 1e-3) -> Reading:
    """An update of four micro-batches with 16, 9, 4 and 1 targets: what is logged against one loss over all 30."""
    micro = micro_batches(vocab_size)
    found, expected = float(training_loss(micro)), own_nats(module, micro)
    return Reading(abs(found / expected - 1), tolerance, f"logged {found:.4f}, is {expected:.4f} nats per target")


@probe("bits-from-bytes", "are the logged bits per byte bits, and per byte?")
def bits_from_bytes(
    training_bits_per_byte: Callable,
    token_length: Callable,
    module: nn.Module,
    vocab_size: int,
    *,
    tolerance: float = 1e-3,
) -> Reading:
    """Nats of all targets, in bits, over the bytes of all targets. `token_length` says how long a token is."""
    micro = micro_batches(vocab_size)
    targets = [int(i) for _, targets, mask in micro for i in targets[mask]]
    size = sum(token_length(i) for i in targets)
    expected = own_nats(module, micro) * len(targets) / math.log(2) / size
    found = float(training_bits_per_byte(micro))
    return Reading(abs(found / expected - 1), tolerance, f"logged {found:.4f}, is {expected:.4f} bits per byte")


# --- accumulation -----------------------------------------------------------------------------------------------------


@probe("accumulation-invariance", "is the norm that is clipped the same in one, two and four micro-batches?")
def accumulation_invariance(gradient_norm: Callable, vocab_size: int, *, tolerance: float = 1e-4) -> Reading:
    """Eight full rows, cut three ways. AdamW hides a factor; the limit of the norm does not. Every target counts here."""
    parts = micro_batches(vocab_size, (16, 16, 16, 16))
    whole = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    halves = [tuple(torch.cat(pair) for pair in zip(*parts[i : i + 2], strict=True)) for i in (0, 2)]
    norms = [float(gradient_norm(micro)) for micro in ([whole], halves, parts)]
    apart = worst(abs(norm / norms[0] - 1) for norm in norms)
    return Reading(apart, tolerance, f"norms {', '.join(f'{norm:.4g}' for norm in norms)}")


@probe("gradient-equivalence", "is the gradient of an accumulated update that of the full batch?")
def gradient_equivalence(
    gradients: Callable, module: nn.Module, vocab_size: int, *, tolerance: float = 1e-4
) -> Reading:
    """Micro-batches with 16, 9, 4 and 1 targets, then only the first two, as where an epoch ends.

    The value is the largest difference of a tensor's gradient, relative to its norm.
    """
    apart = {}
    for counts in ((16, 9, 4, 1), (16, 9)):
        micro, twin = micro_batches(vocab_size, counts), copy.deepcopy(module).eval()
        found = gradients(micro)
        nats(twin, micro).backward()
        expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        whole = float(torch.stack([g.norm() for g in expected.values()]).norm())
        for name, wanted in expected.items():
            # a tensor with next to no gradient is compared with the whole
            size = wanted.norm().clamp(min=1e-3 * whole)
            apart[f"{name} with {len(counts)} micro-batches"] = float((found[name] - wanted).norm() / size)
    where = list(apart)[int(np.argmax(list(apart.values())))]  # argmax finds NaN
    return Reading(apart[where], tolerance, f"relative difference, largest in {where}")


# --- evaluation -------------------------------------------------------------------------------------------------------


def text_rows(vocab_size: int, rows: int = 8, length: int = 17) -> Tensor:
    """(rows, length) of the known source: what is evaluated."""
    return torch.from_numpy(known_tokens(vocab_size, rows * length)[: rows * length]).view(rows, length)


@probe("honest-evaluator", "is the validation loss the loss?")
def honest_evaluator(
    validation_loss: Callable, module: nn.Module, vocab_size: int, *, tolerance: float = 1e-3
) -> Reading:
    """The reported number against the probe's own evaluation of the same model on the same rows.

    Take one that has learned something: an untrained model says ln V, whatever its targets are.
    """
    rows = text_rows(vocab_size)
    one = (rows[:, :-1], rows[:, 1:], torch.ones(len(rows), rows.shape[1] - 1, dtype=torch.bool))
    found, expected = float(validation_loss(rows)), own_nats(module, [one])
    return Reading(abs(found / expected - 1), tolerance, f"reported {found:.4f}, is {expected:.4f} nats per target")


@probe("same-batch", "do training and validation agree about the same rows?")
def same_batch(
    training_loss: Callable, validation_loss: Callable, vocab_size: int, *, tolerance: float = 1e-3
) -> Reading:
    """Needs nothing but the two numbers: the logged loss of an update, from before it, and the validation loss."""
    rows = text_rows(vocab_size)
    one = (rows[:, :-1], rows[:, 1:], torch.ones(len(rows), rows.shape[1] - 1, dtype=torch.bool))
    trained, validated = float(training_loss([one])), float(validation_loss(rows))
    return Reading(abs(trained / validated - 1), tolerance, f"training says {trained:.4f}, validation {validated:.4f}")


@probe("evaluated-twice", "is the validation loss the same when asked again?")
def evaluated_twice(validation_loss: Callable, vocab_size: int) -> Reading:
    """Dropout that is left on draws anew."""
    rows = text_rows(vocab_size)
    first, second = float(validation_loss(rows)), float(validation_loss(rows))
    return Reading(abs(first - second), 0.0, f"{first:.6f}, then {second:.6f}")


@probe("evaluation-changes-nothing", "does it train the same with and without evaluations?")
def evaluation_changes_nothing(evaluated: Callable) -> Reading:
    """Weights after training without evaluations, with one after every second update, and after each."""
    alone = evaluated(None)
    changed = {name for every in (2, 1) for name in differing(alone, evaluated(every))}
    return Reading(float(len(changed)), 0.0, f"tensors that differ: {some(sorted(changed))}")


# --- the schedule and the optimizer -----------------------------------------------------------------------------------


@probe("schedule-shape", "are the learning rates those that were asked for?")
def schedule_shape(rates: Callable, warmup: int, top_rate: float, *, updates: int = 12) -> Reading:
    """The rates that updates were made with: above 0, rising for the warm-up, then never again, with the top that was set.

    And with two micro-batches the same: an update is an update.
    """
    one, two, wrong = list(rates(updates, 1)), list(rates(updates, 2)), []
    top = max(one)
    peak = one.index(top)
    if not one[0] > 0:
        wrong.append(f"the first rate is {one[0]:g}")
    if not math.isclose(top, top_rate, rel_tol=1e-6):
        wrong.append(f"the highest is {top:g} and not {top_rate:g}")
    if not warmup - 1 <= peak <= warmup:
        wrong.append(f"the highest is at update {peak}")
    rises = all(b > a for a, b in itertools.pairwise(one[: peak + 1]))
    if not rises or any(b > a for a, b in itertools.pairwise(one[peak:])):
        wrong.append("it does not rise and then fall")
    if not np.allclose(one, two, rtol=1e-6, atol=0):
        wrong.append("two micro-batches change it")
    return Reading(float(len(wrong)), 0.0, "; ".join(wrong) or "as asked for")


@probe("every-update-moves", "does every update move every parameter?")
def every_update_moves(training: Callable) -> Reading:
    """Tensors that one of the first three updates leaves as they were."""
    weights = [training(updates, None) for updates in range(4)]
    still = {f"{n} by update {i}" for i in range(3) for n, t in weights[i].items() if t.equal(weights[i + 1][n])}
    return Reading(float(len(still)), 0.0, f"not moved: {some(sorted(still))}")


class _Small(nn.Module):
    """A table, a norm and two layers, as an optimizer meets them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


@probe("unused-decay", "do norms and biases stay where nothing asks them to move?")
def unused_decay(make_optimizer: Callable) -> Reading:
    """One step with a gradient of zero: what moves is decayed. Matrices may be; vectors should not."""
    module = _Small()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = make_optimizer(module)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [name for name, p in module.named_parameters() if p.ndim < 2 and not p.equal(before[name])]
    return Reading(float(len(moved)), 0.0, f"decayed: {some(moved)}")


@probe("optimizer-reference", "does the optimizer do what torch's AdamW does?")
def optimizer_reference(
    make_optimizer: Callable, optimizer_settings: Mapping[str, Any], *, steps: int = 50, tolerance: float = 1e-3
) -> Reading:
    """The same gradients for both, some of them tiny, for fifty steps; the reference computes in doubles.

    Matrices only, so that what is decayed is another probe's question. The value is relative to the way that was gone.
    """
    mine, generator = _Small(), torch.Generator().manual_seed(1)
    pairs = [(p, nn.Parameter(p.detach().double())) for p in mine.parameters() if p.ndim > 1]
    start = [other.detach().clone() for _, other in pairs]
    optimizer, reference = make_optimizer(mine), torch.optim.AdamW([p for _, p in pairs], **optimizer_settings)
    for p in mine.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(steps):
        for i, (p, other) in enumerate(pairs):
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** -(3 * i)
            other.grad = p.grad.double()
        optimizer.step()
        reference.step()
    apart = [
        float((p.detach().double() - other.detach()).norm() / (other.detach() - begin).norm())
        for (p, other), begin in zip(pairs, start, strict=True)
    ]
    return Reading(worst(apart), tolerance, f"largest difference after {steps} steps, relative to the way gone")
