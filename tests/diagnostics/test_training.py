"""Probes of trainings on a loop that is not ours: plain torch, with a switch for each bug."""

import copy
import functools
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.diagnostics.probes import ALL, resuming, training

NAN = float("nan")
V, TOP, WARMUP = 16, 0.05, 5
SETTINGS = {"lr": TOP, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
PROBES = [probe for probe in ALL if inspect.getmodule(probe.measure) in (training, resuming)]


class Bigram(torch.nn.Module):
    """Nothing that is ours: a table, dropout, a norm, a layer."""

    def __init__(self, dropout=0.2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table, self.norm, self.head = torch.nn.Embedding(V, 24), torch.nn.LayerNorm(24), torch.nn.Linear(24, V)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, ids):
        return self.head(self.dropout(self.norm(self.table(ids))))


class Loop:
    """A training as one writes it on a Sunday. `bugs` are the names of what is wrong with it."""

    def __init__(self, bugs=(), dropout=0.2, model=None, updates=400):
        self.bugs, self.model, self.done, self.updates = set(bugs), model or Bigram(dropout), 0, updates
        self.optimizer = self.make_optimizer(self.model)
        self.row = {}

    def make_optimizer(self, module):
        parameters = list(module.parameters())
        if "left out" in self.bugs:
            parameters = parameters[:-1]
        vectors = [p for p in parameters if p.ndim < 2]
        groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": vectors, "weight_decay": 0.0}]
        if "decayed norms" in self.bugs:
            groups = parameters
        kind = torch.optim.Adam if "coupled decay" in self.bugs else torch.optim.AdamW
        return kind(groups, **SETTINGS)

    def rate(self, accumulate):
        step = self.done * (accumulate if "per micro-batch" in self.bugs else 1)
        rise = (step if "zero warm-up" in self.bugs else step + 1) / WARMUP
        return TOP * min(1, rise, (self.updates - step) / (self.updates - WARMUP))

    def gradients(self, micro):
        """Accumulates, and returns nats per target."""
        mode = self.model.training
        self.optimizer.zero_grad()
        count, nats = sum(int(mask.sum()) for *_, mask in micro), 0.0
        for inputs, targets, mask in micro:
            if "cleared" in self.bugs:
                self.optimizer.zero_grad()
            if "unshifted" in self.bugs:
                targets = inputs
            total = F.cross_entropy(self.model(inputs)[mask], targets[mask], reduction="sum")
            share = total / count
            if "mean of means" in self.bugs:
                share = total / mask.sum() / len(micro)
            if "undivided" in self.bugs:
                share = total / count * len(micro)
            share.backward()
            nats += float(total.detach())
        assert mode == self.model.training
        if "last logged" in self.bugs:
            nats, count = float(total.detach()), int(mask.sum())
        self.row = {"loss": nats / count, "norm": float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9))}

    def update(self, micro):
        if "never back" not in self.bugs:
            self.model.train()
        torch.manual_seed(self.done)
        self.gradients(micro)
        if not np.isfinite(self.row["loss"]) and "nan unseen" not in self.bugs:
            if "nan skipped" not in self.bugs:
                raise ArithmeticError(f"loss of update {self.done} is {self.row['loss']}")
            self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(len(micro))
        self.row["rate"] = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.done += 1

    def validate(self, rows):
        self.model.train(mode="dropout on" in self.bugs or ("never back" in self.bugs and self.model.training))
        if "dropout on" not in self.bugs:
            self.model.eval()
        with torch.no_grad():
            targets = rows[:, :-1] if "unshifted validation" in self.bugs else rows[:, 1:]
            return float(F.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), targets.flatten()))

    def micro(self, number=None):
        """Two rows of a text; which ones is a function of the update."""
        number = self.done if number is None else number
        if "no seed" in self.bugs:
            number = int.from_bytes(os.urandom(2), "little")
        places = np.random.default_rng(number).integers(0, 500, 2)
        rows = torch.from_numpy(TEXT[places[:, None] + np.arange(9)])
        return [(rows[:, :-1], rows[:, 1:], torch.ones(2, 8, dtype=torch.bool))]

    def save(self, path):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}
        temporary = path.with_suffix(".new")
        if "deletes first" in self.bugs:
            path.unlink(missing_ok=True)
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path):
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        if "no moments" not in self.bugs:
            self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


TEXT = training.known_tokens(V, 600)


@functools.cache
def learned():
    """A model that knows something: of one that does not, every loss is about ln V, whatever it is compared with."""
    made = Loop(dropout=0.0)
    for _ in range(60):
        made.update(made.micro())
    return made.model.state_dict()


def specimen(*bugs):
    module = Bigram()
    module.load_state_dict(learned())

    def plain(micro):
        made = Loop(bugs, model=copy.deepcopy(module).eval())
        made.gradients(micro)
        return made

    def losses(tokens):
        made, seen = Loop(bugs, dropout=0.0), []
        for rows in torch.from_numpy(tokens[:12_240]).view(-1, 4, 17):
            made.update([(rows[:, :-1], rows[:, 1:], torch.ones(4, 16, dtype=torch.bool))])
            seen.append(made.row["loss"])
        return seen

    def weights(made):
        return {name: p.detach().clone() for name, p in made.model.named_parameters()}

    def run(updates, folder):
        made, path = Loop(bugs), folder and folder / "state.pt"
        if path and path.exists():
            made.load(path)
        while made.done < updates:
            made.update(made.micro())
        if path:
            made.save(path)
        return weights(made)

    def evaluated(every):
        made = Loop(bugs)
        for done in range(1, 6):
            made.update(made.micro())
            if every and done % every == 0:
                made.validate(torch.from_numpy(TEXT[:90]).view(10, 9))
        return weights(made)

    def rates(updates, accumulate):
        made, seen = Loop(bugs, updates=updates), []
        for _ in range(updates):
            made.update(made.micro() * accumulate)
            seen.append(made.row["rate"])
        return seen

    def poisoned():
        made = Loop(bugs)
        made.model.head.register_forward_hook(lambda *_: _[-1] * NAN if made.done == 2 else _[-1])
        try:
            while made.done < 5:
                made.update(made.micro())
        except ArithmeticError as error:
            return weights(made), str(error)
        return weights(made), ""

    def save_numbered(folder, number):
        made = Loop(bugs)
        made.done = number
        made.save(folder / "state.pt")

    def newest_number(folder):
        made = Loop(bugs)
        made.load(folder / "state.pt")
        return made.done

    def load_weights(tensors):
        made = Bigram()
        made.load_state_dict(tensors, strict="lenient" not in bugs)
        return made

    size = (lambda i: 1) if "tokens for bytes" in bugs else (lambda i: 1 + i % 3)

    def bits_per_byte(micro):
        targets = [int(i) for _, targets, mask in micro for i in targets[mask]]
        return plain(micro).row["loss"] / np.log(2) * len(targets) / sum(map(size, targets))

    return {
        "module": module,
        "vocab_size": V,
        "losses": losses,
        "training_loss": lambda micro: plain(micro).row["loss"],
        "training_bits_per_byte": bits_per_byte,
        "token_length": lambda i: 1 + i % 3,
        "gradients": lambda micro: {n: p.grad for n, p in plain(micro).model.named_parameters()},
        "gradient_norm": lambda micro: plain(micro).row["norm"],
        "validation_loss": Loop(bugs, model=copy.deepcopy(module)).validate,
        "evaluated": evaluated,
        "training": run,
        "poisoned_training": poisoned,
        "rates": rates,
        "warmup": WARMUP,
        "top_rate": TOP,
        "make_optimizer": Loop(bugs).make_optimizer,
        "optimizer_settings": SETTINGS,
        "load_weights": load_weights,
        "save_numbered": save_numbered,
        "newest_number": newest_number,
    }


def test_no_false_alarm_on_a_plain_loop():
    found = {probe.name: probe.examine(specimen())[0] for probe in PROBES}
    assert len(found) == 19
    assert not [f"{name}: {reading}" for name, reading in found.items() if reading.caught]


CATCHES = {
    "unshifted": {"known-entropy", "honest-log", "bits-from-bytes", "gradient-equivalence", "same-batch"},
    "mean of means": {"gradient-equivalence"},
    "undivided": {"gradient-equivalence", "accumulation-invariance"},
    "cleared": {"gradient-equivalence", "accumulation-invariance"},
    "last logged": {"honest-log", "bits-from-bytes"},
    "tokens for bytes": {"bits-from-bytes"},
    "unshifted validation": {"honest-evaluator", "same-batch"},
    "dropout on": {"evaluated-twice", "honest-evaluator", "same-batch"},
    "never back": {"evaluation-changes-nothing"},
    "per micro-batch": {"schedule-shape"},
    "zero warm-up": {"schedule-shape", "every-update-moves"},
    "left out": {"every-update-moves", "optimizer-reference"},
    "decayed norms": {"unused-decay"},
    "coupled decay": {"optimizer-reference"},
    "no seed": {"run-twice", "bitwise-resume", "evaluation-changes-nothing"},
    "no moments": {"bitwise-resume"},
    "lenient": {"strict-load"},
    "deletes first": {"kill-during-save"},
    "nan skipped": {"finite-state"},
    "nan unseen": {"finite-state"},
}


@pytest.mark.parametrize("bug", CATCHES)
def test_a_bug_is_caught_by_its_probes_and_by_no_other(bug):
    made = specimen(bug)
    slow = {"loss-falls", "known-entropy", "kill-during-save"} - CATCHES[bug]
    caught = {probe.name for probe in PROBES if probe.name not in slow and probe.examine(made)[0].caught}
    assert caught == CATCHES[bug]


def test_a_loss_that_does_not_fall():
    assert training.loss_falls(losses=lambda tokens: [3.0] * 50, vocab_size=V).caught
    assert training.loss_falls(losses=lambda tokens: [3.0] * 40 + [NAN] * 10, vocab_size=V).caught
    rate = training.MarkovSource().entropy_rate * np.log(2)
    for end, caught in ((rate, False), (rate - 0.2, True), (rate + 0.2, False), (rate + 0.4, True), (NAN, True)):
        assert training.known_entropy(losses=lambda tokens, end=end: [end] * 50, vocab_size=V).caught == caught


def test_a_rate_is_held_to_what_was_asked():
    right = [TOP * min((i + 1) / WARMUP, (12 - i) / 7) for i in range(12)]
    for made, said in (
        (right, "as asked for"),
        ([2 * r for r in right], "the highest is 0.1 and not 0.05"),
        (right[3:] + right[:3], "the highest is at update 1"),
        ([*right[:8], TOP / 10, *right[9:]], "rise and then fall"),
        ([*right[:8], NAN, *right[9:]], "change it"),
    ):
        found = training.schedule_shape(rates=lambda n, k, made=made: made, warmup=WARMUP, top_rate=TOP)
        assert said in found.note
        assert found.caught == (said != "as asked for")


def test_nan_is_never_lost():
    norms = iter([1.0, NAN, 1.0])
    assert training.accumulation_invariance(gradient_norm=lambda micro: next(norms), vocab_size=V).caught
    healthy = specimen()

    def spoiled(micro):
        made = healthy["gradients"](micro)
        made["norm.weight"][0] = NAN
        return made

    assert training.gradient_equivalence.examine({**healthy, "gradients": spoiled})[0].caught
    some = training.gradient_equivalence.examine({**healthy, "gradients": lambda micro: {}})[0]
    assert some.caught, "a tensor without a gradient"
    for name in ("training_loss", "validation_loss"):
        probes = [probe for probe in PROBES if name in probe.needs]
        assert all(probe.examine({**healthy, name: lambda _: NAN})[0].caught for probe in probes)
    assert resuming.finite_state(poisoned_training=lambda: ({"w": torch.tensor([NAN])}, "loss of update 2")).value == 1
    assert resuming.finite_state(poisoned_training=lambda: ({"w": torch.ones(1)}, "loss: nan")).value == 1


def test_a_death_during_a_save_is_as_final_as_a_kill(tmp_path):
    """What a program would do afterwards, in `finally` too, does not reach the disk; and other threads live on."""

    def write():
        try:
            (tmp_path / "a").write_text("a")
            (tmp_path / "b").write_text("b")
        finally:
            (tmp_path / "c").write_text("c")

    assert not resuming._Trap.survives(write, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert resuming._Trap.survives(write, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    (tmp_path / "d").write_text("the trap is closed")

    def in_place(folder: Path, number: int) -> None:
        for part in ("first", "second"):
            (folder / part).write_text(str(number))

    def newest(folder: Path) -> int:
        first, second = ((folder / part).read_text() for part in ("first", "second"))
        assert first == second
        return int(first)

    found = resuming.kill_during_save(save_numbered=in_place, newest_number=newest)
    assert (found.value, found.note) == (1, "of 3 moments leave nothing to resume from")
    with pytest.raises(ValueError, match="larger `most`"):
        resuming.kill_during_save(save_numbered=in_place, newest_number=newest, most=2)
