"""Losses over rows, pairs and sequences go through the same trainer: accumulated, logged, and resumed to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.foundation.files import read_json
from common.training.objectives import NextToken, Terms
from tests.training.tiny import V, losses_of, trainer_of
from tests.training.units import UNITS, Labels

FIRST = ("step", "loss", "gradient_norm", "rate")


def training(name, rows=8, **options):
    objective, stream, _ = UNITS[name]
    return trainer_of(objective=objective(), stream=stream(rows), **options)


@pytest.mark.parametrize("name", UNITS)
def test_it_learns_and_reports_in_its_own_unit(name):
    rise = {"labels": ("accuracy", 0.9), "preference": ("won", 0.9), "distilled": None}[name]
    made = training(name, rows=16, steps=60, rate=1e-2, kind="muon").train()
    assert {tuple(row) for row in made.history} == {(*FIRST, f"{UNITS[name][0].unit}s", *sorted(UNITS[name][2]))}
    first, last = made.history[0], made.history[-10:]
    assert sum(row["loss"] for row in last) / 10 < 0.7 * first["loss"]
    if rise:
        assert sum(row[rise[0]] for row in last) / 10 > rise[1]
    assert f"{UNITS[name][0].unit}s/s" in made._progress(first, 3.0)


@pytest.mark.parametrize(("rows", "accumulate"), [(4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("name", UNITS)
def test_accumulation_is_the_full_batch(name, rows, accumulate):
    def step(rows, accumulate):
        made, seen = training(name, rows, accumulate=accumulate), {}
        names, go = dict(made.model.named_parameters()), made.optimizers.step
        made.optimizers.step = lambda: (seen.update({n: p.grad.clone() for n, p in names.items()}), go())
        with torch.no_grad():  # away from the reference, or a preference has nothing to say
            for number, p in enumerate(names.values()):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)), alpha=0.05)
        return made.update(), seen

    objective, stream, _ = UNITS[name]
    pieces = stream(rows)
    counts = [int(objective().prepare(pieces.next_batch(), 0).units) for _ in range(accumulate)]
    assert len(set(counts)) > 1, "unequal, so that a mean of means would differ"
    (row, whole), (same, parts) = step(8, 1), step(rows, accumulate)
    unit = f"{objective.unit}s"
    assert row[unit] == same[unit] == sum(counts)
    assert row == {key: pytest.approx(value, rel=1e-5, abs=1e-7) for key, value in same.items()}
    for key in whole:
        assert (parts[key] - whole[key]).norm() < 1e-5 * whole[key].norm() + 1e-9, key


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children of a fork")
def test_killed_each_of_them_ends_with_the_same_bits(tmp_path):
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path), *UNITS]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stderr
    for name in UNITS:
        seen = read_json(tmp_path / name / "seen.json")
        assert len({whole for whole, _ in seen}) >= 2, f"at different moments: {seen}"
        calm, killed = (read_json(tmp_path / name / which / "rows.json") for which in ("undisturbed", "killed"))
        assert calm == killed
        assert set(UNITS[name][2]) <= calm["history"][-1].keys()
        weights = [(tmp_path / name / w / "model.safetensors").read_bytes() for w in ("undisturbed", "killed")]
        assert weights[0] == weights[1]


def test_a_count_that_is_not_what_was_prepared_is_an_error():
    class Miscounted(Labels):
        def loss(self, model, prepared):
            terms = super().loss(model, prepared)
            return terms._replace(count=terms.count + 1)

    made = trainer_of(objective=Miscounted())
    with pytest.raises(ValueError, match="update 0: Miscounted prepared 2 rows and its loss counts 3"):
        made.update()
    assert all(p.grad is None for p in made.model.parameters())


def test_a_name_that_the_trainer_writes_is_refused():
    class Clashing(NextToken):
        def loss(self, model, prepared):
            return super().loss(model, prepared)._replace(logged={"loss": 1.0})

    with pytest.raises(ValueError, match=r"update 0: Clashing logs \['loss'\], which the trainer writes"):
        trainer_of(objective=Clashing()).update()


def test_no_unit_at_all_is_an_error():
    class Unlabelled(Labels):
        def prepare(self, batch, number):
            prepared = super().prepare(batch, number)
            prepared.values["labelled"] &= False
            return type(prepared)(prepared.values, 0)

    with pytest.raises(ValueError, match="update 0: no row counts in any of its batches"):
        trainer_of(objective=Unlabelled()).update()


def test_bits_per_byte_need_tokens():
    with pytest.raises(
        ValueError, match="byte_lengths needs an objective whose targets are tokens, and Labels has rows"
    ):
        trainer_of(objective=Labels(), byte_lengths=torch.ones(V)).update()


def test_logged_is_a_mean_over_the_units_of_all_micro_batches():
    class Logging(Labels):
        def loss(self, model, prepared):
            terms = super().loss(model, prepared)
            return terms._replace(logged={"twice": 2 * terms.sum, "ones": float(terms.count)})

    plain, logging = (trainer_of(objective=o, accumulate=3, steps=3).train() for o in (Labels(), Logging()))
    assert losses_of(logging) == losses_of(plain), "what is logged changes nothing"
    for row in logging.history:
        assert row["twice"] == pytest.approx(2 * row["loss"], rel=1e-6)
        assert row["ones"] == 1.0


def test_the_mean_of_terms():
    assert float(Terms(torch.tensor(6.0), torch.tensor(4)).mean) == 1.5
    assert float(Terms(torch.tensor(0.0), 0).mean) == 0.0
