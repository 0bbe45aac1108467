"""The training loop: a model, an objective, a stream, optimizers and a schedule. Everything else only watches.

    for each update:  draw `accumulate` micro-batches, count their units, and for each
                          loss = sum over its units / units of ALL of them      (not a mean of means)
                          backward
                      check, clip, step

What a unit is (a target, a row, a pair) and what its loss is, the objective says: see objectives.py.

A training is a function of its arguments: killed at any moment and started again from its last snapshot, it ends with the
same bits as if it had not been disturbed. So all randomness is a function of the number of the update, and everything else
that an update depends on is in the snapshot: weights, optimizer state, position in the data, and the history.

This follows llm.c and nanochat in spirit. Left out on purpose are callbacks and gradient scaling for fp16.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.data.stream import Stream
from common.tokenization.protocol import Tokenizer
from common.training.distributed import World, gathered, inner
from common.training.loss import bits
from common.training.objectives import NextToken, Objective, Prepared, PreparedTokens
from common.training.optimizers import Optimizers
from common.training.rounding import rounded_products
from common.training.schedules import Schedule
from common.training.snapshots import Snapshots

WRITTEN = ("step", "loss", "gradient_norm", "rate", "bytes", "bits_per_byte")  # and the units, under their own name
HistoryRow = dict[str, float]  # what is kept of an update or an evaluation; the time of day is not in it


class TrainingDiverged(ArithmeticError):
    """The loss or a gradient is not finite. The weights are those from before the update."""


@dataclass
class Settings:
    """How to train, whatever the model and the data are.

    Attributes:
        seed: the seed of dropout; torch's generator is seeded again for each update.
        accumulate: the number of micro-batches in one update.
        clip: the largest norm of the gradient over all parameters; None never clips.
        dtype: the format of matrix products under `torch.autocast`; weights, sums and the loss stay fp32.
        rounded: compute products in fp32 and round them to bf16, for processors on which bf16 itself is slow.
        evaluate_every, save_every: the number of updates between two; None evaluates or saves only at the end.
    """

    seed: int = 0
    accumulate: int = 1
    clip: float | None = 1.0
    dtype: torch.dtype = torch.float32
    rounded: bool = False
    evaluate_every: int | None = None
    save_every: int | None = None


@dataclass
class Trainer:
    """Trains a model in place.

    Args:
        model: the model that the optimizers were made for; wrapped by `World.wrap` where there are several processes.
        stream: the stream of this process; see `BatchStream(rank=…, world_size=…)`.
        objective: what is learned from a batch, and the unit of the loss.
        evaluate: (model, updates done) -> numbers, called in evaluation mode without gradients. It must not use the stream.
        snapshots: where to save and to resume from.
        byte_lengths: (V,) bytes of each token; then bits per byte are logged beside nats per target. Only for objectives
            whose targets are tokens.
        watch: called with each row of the history, also with those from before a resume.
        flops_per_token: FLOP of a forward pass for one target; with `peak_flops` of the machine it gives the utilisation.
    Attributes:
        done: the number of updates so far.
        history: one row for each update: step, loss (mean over units), gradient_norm, rate, the number of units under the
            name of the unit ("targets", "rows", "pairs"), and the means of whatever the objective logs.
        evaluations: one row for each evaluation.
    """

    model: nn.Module
    stream: Stream
    optimizers: Optimizers
    schedule: Schedule
    settings: Settings = field(default_factory=Settings)
    objective: Objective = field(default_factory=NextToken)
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None
    snapshots: Snapshots | None = None
    tokenizer: Tokenizer | None = None
    byte_lengths: Tensor | None = None
    watch: Callable[[HistoryRow], None] | None = None
    world: World = field(default_factory=World)
    label: str = "training"
    flops_per_token: int = 0
    peak_flops: float = 0.0
    done: int = 0
    history: list[HistoryRow] = field(default_factory=list)
    evaluations: list[HistoryRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Batches drawn by all processes together. An objective seeds its randomness with this number, so that what it draws
        # for a batch does not depend on how many processes share the batches.
        self._drawn = 0
        if self.snapshots is not None and self.tokenizer is None:
            raise ValueError("snapshots are bound to a tokenizer: give tokenizer=")

    def train(self, until: int | None = None) -> "Trainer":
        """Train until `until` updates are done (by default all of the schedule's), from a snapshot if there is one.

        Raises:
            TrainingDiverged: a loss or gradient is not finite. The message names the update, its batches and the first
                module whose output went wrong.
        """
        until = self.schedule.steps if until is None else until
        if self.snapshots is not None and self.done == 0:
            self.resume()
        if self.done == 0:
            self._evaluate()
        bar = tqdm(
            total=until,
            initial=self.done,
            desc=self.label,
            unit="step",
            delay=2,
            disable=True if self.world.rank else None,
        )
        start, units = time.perf_counter(), 0
        with bar:
            while self.done < until:
                row = self.update()
                units += int(row[f"{self.objective.unit}s"])
                bar.update()
                bar.set_postfix(self._progress(row, units / (time.perf_counter() - start)), refresh=False)
                every = self.settings.evaluate_every
                if self.done == until or (every and self.done % every == 0):
                    self._evaluate()
                every = self.settings.save_every
                if self.snapshots is not None and (self.done == until or (every and self.done % every == 0)):
                    self.save()
        self.model.eval()
        return self

    def update(self) -> HistoryRow:
        """One step of the optimizers. Returns its row of the history."""
        self.model.train()  # an evaluation, or an engine that shares the model, may have left evaluation mode on
        self._seed()
        rate = self.schedule(self.done)
        self.optimizers.set_rate(rate)

        # All micro-batches are drawn before the first backward pass, because the divisor of each is the number of units in
        # all of them, over all processes. A mean of the micro-batches' means would weigh a unit in a nearly empty one more.
        prepared = [self._draw() for _ in range(self.settings.accumulate)]
        device = next(self.model.parameters()).device
        mine = torch.stack([torch.as_tensor(one.units) for one in prepared]).sum()
        units = self.world.sum(mine.to(device))
        if units == 0:
            raise ValueError(
                f"update {self.done}: no {self.objective.unit} counts in any of its batches; look at loss_mask, or at what "
                "the objective counts as units"
            )

        total, counted = torch.zeros((), device=device), 0
        logged: dict[str, Tensor] = {}
        for place, one in enumerate(prepared):
            last = place + 1 == len(prepared)
            # Processes exchange gradients once an update, with the last micro-batch; before it each adds up its own.
            with self.world.only_sync_if(self.model, last):
                # Only the forward pass and the loss are in autocast: backward repeats the formats of the forward pass.
                with self._autocast(device):
                    terms = self.objective.loss(self.model, one.to(device))
                # The penalty is a mean, so it is weighed with the units of its micro-batch, as a part of the whole mean
                # (gallery: pretraining/mean-of-means). Wrappers average the gradients over processes, and the units
                # above are a sum over processes: multiplying by their number turns the average back into a sum.
                whole = (terms.sum + terms.penalty * terms.count) / units * self.world.size
                whole.backward()
            total += terms.sum.detach()
            counted = counted + terms.count
            for name, value in terms.logged.items():
                value = torch.as_tensor(value, device=device).detach()
                logged[name] = logged[name] + value if name in logged else value
        self._check_objective(int(mine), int(counted), logged)

        # The loss that is reported is the one that was minimised, without the penalty, over all processes.
        total = self.world.sum(total)
        norm = self.clip_gradients()
        mean = float(total / units)
        # Before the step, so that the weights are still good; and both, because a finite loss can have an infinite gradient.
        if not math.isfinite(mean) or not math.isfinite(norm):  # gallery: pretraining/skipped-nan
            said = self._diagnosis(prepared, mean, norm)
            self.optimizers.zero_grad()
            raise TrainingDiverged(said)
        self.optimizers.step()
        self.optimizers.zero_grad()  # after the step and not before the next: gradients need no memory in evaluations
        self.done += 1

        count = f"{self.objective.unit}s"
        row = {"step": self.done, "loss": mean, "gradient_norm": norm, "rate": rate, count: int(units)}
        for name in sorted(logged):  # sorted, so that processes that log in another order add up the same quantities
            row[name] = float(self.world.sum(logged[name].float()) / units)
        if self.byte_lengths is not None:
            row |= self._bits_per_byte(prepared, total)
        self.history.append(row)
        if self.watch:
            self.watch(row)
        return row

    def _check_objective(self, prepared: int, counted: int, logged: Mapping[str, Tensor]) -> None:
        """Raises ValueError, before the step, if the objective contradicts itself or the trainer."""
        name, unit = type(self.objective).__name__, self.objective.unit
        said = ""
        if counted != prepared:  # the loss was divided by another number than the one that it was summed over
            said = f"prepared {prepared} {unit}s and its loss counts {counted}: `units` and `Terms.count` must agree"
        if taken := logged.keys() & {*WRITTEN, f"{unit}s"}:
            said = f"logs {sorted(taken)}, which the trainer writes: rename it"
        if said:
            self.optimizers.zero_grad()
            raise ValueError(f"update {self.done}: {name} {said}")

    def _bits_per_byte(self, prepared: list[Prepared], nats: Tensor) -> HistoryRow:
        """The bytes that the targets of an update stand for, and the loss for each of them."""
        if not all(isinstance(one, PreparedTokens) for one in prepared):
            raise ValueError(
                f"byte_lengths needs an objective whose targets are tokens, and {type(self.objective).__name__} has "
                f"{self.objective.unit}s: leave byte_lengths out"
            )
        mine = sum(self.byte_lengths[one.batch.targets[one.batch.loss_mask]].sum() for one in prepared)
        size = int(self.world.sum(torch.as_tensor(mine).to(nats.device)))
        return {"bytes": size, "bits_per_byte": bits(float(nats)) / max(1, size)}

    def clip_gradients(self) -> float:
        """Scale all gradients down to the largest norm allowed; returns the norm that they had before."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = float(gathered(norm))
        clip = self.settings.clip
        if clip is not None and math.isfinite(norm) and norm > clip:
            for gradient in gradients:
                gradient.mul_(clip / (norm + 1e-6))
        return norm

    def save(self) -> Path:
        """Write a snapshot of everything an update depends on."""
        assert self.snapshots is not None
        return self.snapshots.save(self)

    def resume(self) -> bool:
        """Continue from the newest whole snapshot; False if there is none."""
        assert self.snapshots is not None
        found = self.snapshots.load_newest(self)
        for row in [*self.history, *self.evaluations] if found and self.watch else []:
            self.watch(row)
        return found

    def progress_state(self) -> dict[str, Any]:
        """What a snapshot keeps beside tensors, as plain values."""
        return {
            "done": self.done,
            "drawn": self._drawn,
            "stream": self.stream.state_dict(),
            "counters": self.optimizers.counters(),
            "history": self.history,
            "evaluations": self.evaluations,
        }

    def load_progress(self, state: Mapping[str, Any]) -> None:
        """Take over `progress_state`."""
        self.stream.load_state_dict(state["stream"])
        self.done, self._drawn = state["done"], state["drawn"]
        self.history, self.evaluations = list(state["history"]), list(state["evaluations"])

    def _draw(self) -> Prepared:
        number = self._drawn + self.world.rank
        self._drawn += self.world.size
        return self.objective.prepare(self.stream.next_batch(), number)

    def _seed(self) -> None:
        """Make dropout a function of the update and the process alone, so that a resumed training repeats it."""
        torch.manual_seed((self.settings.seed * 1_000_003 + self.done) * self.world.size + self.world.rank)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        dtype = self.settings.dtype
        if self.settings.rounded:
            return rounded_products()
        return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        self.model.eval()  # gallery: pretraining/evaluation-in-training-mode
        with torch.no_grad():
            row = {"step": self.done, **self.evaluate(self.model, self.done)}
        self.evaluations.append(row)
        if self.watch:
            self.watch(row)

    def _progress(self, row: HistoryRow, speed: float) -> dict[str, str]:
        """What the progress bar shows; tqdm adds the time left."""
        shown = {"loss": f"{row['loss']:.3f}"}
        if "bits_per_byte" in row:
            shown["bits/byte"] = f"{row['bits_per_byte']:.3f}"
        shown |= {"grad": f"{row['gradient_norm']:.2f}", "rate": f"{row['rate']:.2f}"}
        shown[f"{self.objective.unit}s/s"] = f"{speed:,.0f}"
        if self.peak_flops and self.objective.unit == "target":  # `speed` counts units, `flops_per_token` tokens
            shown["of peak"] = f"{3 * self.flops_per_token * speed / (self.peak_flops * self.world.size):.0%}"
        return shown

    def _diagnosis(self, prepared: list[Prepared], mean: float, norm: float) -> str:
        """Where the trouble began: the first module whose output is not finite, or else the loss, or else a gradient."""
        self._seed()  # the forward passes are repeated, and must draw the same dropout
        model = inner(self.model)
        found: list[str] = []

        def look(name: str) -> Callable:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if not found and isinstance(tensor, Tensor) and not tensor.isfinite().all():
                    found.append(name)

            return hook

        hooks = [module.register_forward_hook(look(name or "the model")) for name, module in model.named_modules()]
        device = next(self.model.parameters()).device
        with torch.no_grad(), self._autocast(device):
            for one in prepared:
                self.objective.loss(self.model, one.to(device))
        for hook in hooks:
            hook.remove()
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        where = f"first in the gradient of {bad[0] if bad else 'nothing'}"
        if found:
            where = f"first in the output of {found[0]}"
        elif not math.isfinite(mean):
            other = "" if self.world.size == 1 else ", or in another process"
            where = f"first in the loss{other}: all outputs here are finite"
        return (
            f"update {self.done}: loss {mean}, gradient norm {norm}, {where}; batches "
            f"{self._drawn - len(prepared) * self.world.size} to "
            f"{self._drawn - 1} of the stream (epoch {self.stream.epoch}). The weights are unchanged. Lower the learning "
            "rate, lengthen the warm-up, or look at these batches."
        )
