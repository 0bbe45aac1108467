"""The training loop, as an engine: model, objective, stream, optimizers, schedule. Everything else is watching.

    for each update:  draw `accumulate` micro-batches, count their targets, and for each
                          loss = sum of nats / targets of ALL of them        (not a mean of means)
                          backward
                      check, clip, step

A run is a function of its arguments: killed at any moment and started again from its last checkpoint, it ends with the same
bits as undisturbed. So randomness is a function of the number of the update, and everything else that an update depends on
is in the snapshot: weights, optimizer state, position in the data, and the history of losses.

After llm.c and nanochat in spirit. Left out on purpose: callbacks, mixed objectives, gradient scaling for fp16.
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

from common.data.documents import Batch
from common.data.stream import BatchStream
from common.tokenization.protocol import Tokenizer
from common.training.distributed import World, gathered, inner
from common.training.loss import bits
from common.training.objectives import NextToken, Objective, Prepared, loss_of
from common.training.optimizers import Optimizers
from common.training.rounding import rounded_products
from common.training.schedules import Schedule
from common.training.snapshots import Snapshots

Row = dict[str, float]  # what is kept of an update; the clock is not in it


class TrainingDiverged(ArithmeticError):
    """The loss or a gradient is not finite. The weights are those from before the update."""


@dataclass
class Settings:
    """How to train, apart from what and on what.

    Attributes:
        seed: of dropout; torch's generator is set anew for each update.
        accumulate: micro-batches for one update.
        clip: largest norm of the gradient over all parameters; None never clips.
        dtype: bf16 computes products in it by `torch.autocast`; weights, sums and the loss stay fp32.
        rounded: compute products in fp32 and round them to bf16, for processors on which bf16 itself is slow.
        evaluate_every, save_every: updates between; None only at the end.
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
    """Trains in place.

    Args:
        model: as the optimizers know it; wrapped by `World.wrap` where there are several processes.
        stream: of this process; see `BatchStream(rank=…, world_size=…)`.
        evaluate: (model, updates done) -> numbers, called in evaluation mode without gradients. It must not use the stream.
        snapshots: where to save and to resume from.
        byte_lengths: (V,) bytes of each token; then bits per byte are logged beside nats per target.
        watch: called with each row of the history, also with those of before a resume.
        flops_per_token, peak_flops: of a forward pass, and of the machine: for utilisation.
    Attributes:
        done: updates so far.
        history: one row for each update: step, loss (nats per target), gradient_norm, rate, targets.
        evaluations: one row for each evaluation.
    """

    model: nn.Module
    stream: BatchStream
    optimizers: Optimizers
    schedule: Schedule
    settings: Settings = field(default_factory=Settings)
    objective: Objective = field(default_factory=NextToken)
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None
    snapshots: Snapshots | None = None
    tokenizer: Tokenizer | None = None
    byte_lengths: Tensor | None = None
    watch: Callable[[Row], None] | None = None
    world: World = field(default_factory=World)
    label: str = "training"
    flops_per_token: int = 0
    peak_flops: float = 0.0
    done: int = 0
    history: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._drawn = 0  # batches of all processes together: objectives draw by the number, however many there are
        if self.snapshots is not None and self.tokenizer is None:
            raise ValueError("snapshots are bound to a tokenizer: give tokenizer=")

    def train(self, until: int | None = None) -> "Trainer":
        """Go on until `until` updates are done, all of the schedule's by default; resume first if there is a snapshot.

        Raises:
            TrainingDiverged: names the update, its batches and the first module that went wrong.
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
        start, tokens = time.perf_counter(), 0
        with bar:
            while self.done < until:
                row = self.update()
                tokens += int(row["targets"])
                bar.update()
                bar.set_postfix(self._progress(row, tokens / (time.perf_counter() - start)), refresh=False)
                every = self.settings.evaluate_every
                if self.done == until or (every and self.done % every == 0):
                    self._evaluate()
                every = self.settings.save_every
                if self.snapshots is not None and (self.done == until or (every and self.done % every == 0)):
                    self.save()
        self.model.eval()
        return self

    def update(self) -> Row:
        """One step of the optimizers. Returns its row of the history."""
        self.model.train()
        self._seed()
        rate = self.schedule(self.done)
        self.optimizers.set_rate(rate)
        prepared = [self._draw() for _ in range(self.settings.accumulate)]
        device = next(self.model.parameters()).device
        targets = self.world.sum(torch.stack([one.batch.loss_mask.sum() for one in prepared]).sum().to(device))
        if targets == 0:
            raise ValueError(f"update {self.done}: no target counts in any of its batches; look at loss_mask")
        nats = torch.zeros((), device=device)
        for place, one in enumerate(prepared):
            last = place + 1 == len(prepared)
            with self.world.only_sync_if(self.model, last):
                with self._autocast(device):
                    loss, penalty = loss_of(self.model, _to(one, device))
                # Each micro-batch weighs as many parts as it has targets (gallery: pretraining/mean-of-means). Processes
                # average their gradients, so each multiplies by their number: the sum is what is wanted.
                whole = (loss.sum + penalty * loss.count) / targets * self.world.size
                whole.backward()
            nats += loss.sum.detach()
        nats = self.world.sum(nats)
        norm = self.clip_gradients()
        mean = float(nats / targets)
        if not math.isfinite(mean) or not math.isfinite(norm):  # gallery: pretraining/skipped-nan
            said = self._diagnosis(prepared, mean, norm)
            self.optimizers.zero_grad()
            raise TrainingDiverged(said)
        self.optimizers.step()
        self.optimizers.zero_grad()
        self.done += 1
        row = {"step": self.done, "loss": mean, "gradient_norm": norm, "rate": rate, "targets": int(targets)}
        if self.byte_lengths is not None:
            mine = sum(self.byte_lengths[one.batch.targets[one.batch.loss_mask]].sum() for one in prepared)
            row["bytes"] = int(self.world.sum(torch.as_tensor(mine).to(device)))
            row["bits_per_byte"] = bits(float(nats)) / max(1, row["bytes"])
        self.history.append(row)
        if self.watch:
            self.watch(row)
        return row

    def clip_gradients(self) -> float:
        """Scale all gradients down to the largest norm allowed; returns the norm from before."""
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
        """What a snapshot keeps beside tensors: plain values."""
        return {
            "done": self.done,
            "drawn": self._drawn,
            "stream": self.stream.state_dict(),
            "counters": self.optimizers.counters(),
            "history": self.history,
            "evaluations": self.evaluations,
        }

    def load_progress(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.done, self._drawn = state["done"], state["drawn"]
        self.history, self.evaluations = list(state["history"]), list(state["evaluations"])

    def _draw(self) -> Prepared:
        number = self._drawn + self.world.rank
        self._drawn += self.world.size
        return self.objective.prepare(self.stream.next_batch(), number)

    def _seed(self) -> None:
        """Dropout is a function of the update and the process."""
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

    def _progress(self, row: Row, speed: float) -> dict[str, str]:
        """The progress line; tqdm adds the time left."""
        shown = {"loss": f"{row['loss']:.3f}"}
        if "bits_per_byte" in row:
            shown["bits/byte"] = f"{row['bits_per_byte']:.3f}"
        shown |= {"grad": f"{row['gradient_norm']:.2f}", "rate": f"{row['rate']:.2f}", "tok/s": f"{speed:,.0f}"}
        if self.peak_flops:
            shown["of peak"] = f"{3 * self.flops_per_token * speed / (self.peak_flops * self.world.size):.0%}"
        return shown

    def _diagnosis(self, prepared: list[Prepared], mean: float, norm: float) -> str:
        """Where it began: the first module whose output is not finite, or else the loss, or else a gradient."""
        self._seed()  # the same dropout once more
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
                loss_of(self.model, _to(one, device))
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


def _to(prepared: Prepared, device: torch.device) -> Prepared:
    """Onto the device of the model."""
    if device.type == "cpu":
        return prepared
    batch = Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(prepared.batch).items()})
    return Prepared(batch, None if prepared.prefix is None else prepared.prefix.to(device))
