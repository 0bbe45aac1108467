"""What every schedule promises, the cosine against the formula of the first loop."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.training import fit as simple
from common.training.schedules import Schedule, cosine, warmup_stable_decay
from common.training.trainer import Trainer
from tests.training.tiny import CONFIG, stream_of, trainer_of

KINDS = ("cosine", "wsd", "constant")
sizes = {"steps": st.integers(1, 200), "warmup": st.integers(0, 60), "floor": st.sampled_from([0.0, 0.1, 0.5])}


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(KINDS), **sizes)
def test_rises_stays_and_falls(kind, steps, warmup, floor):
    warmup = min(warmup, steps // 2)
    schedule = Schedule(steps, warmup, kind, floor)
    factors = [schedule(step) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors), "the first update is not wasted, nor the last"
    rise, rest = factors[: max(1, warmup)], factors[max(1, warmup) :]
    for step, factor in enumerate(rise):
        assert factor == pytest.approx((step + 1) / max(1, warmup)) or kind == "wsd"
    assert all(a < b for a, b in itertools.pairwise(rise)) or kind == "wsd"
    assert all(a >= b for a, b in itertools.pairwise(rest)), "it never rises again"
    assert min(rest, default=1.0) >= floor
    if kind == "constant":
        assert set(rest) <= {1.0}
    if kind == "cosine" and steps > 3 * max(1, warmup):
        assert max(factors) == pytest.approx(1.0)
        assert factors[-1] < floor + (1 - floor) * 3 / (steps - max(1, warmup))


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(20, 300), more=st.integers(1, 300), warmup=st.integers(0, 5))
def test_the_plateau_does_not_depend_on_the_length(steps, more, warmup):
    begin = steps - round(0.3 * steps)
    short, long = ([warmup_stable_decay(step, n, warmup) for step in range(n)] for n in (steps, steps + more))
    assert short[:begin] == long[:begin]
    assert set(short[max(1, warmup) : begin]) == {1.0}
    falling = short[begin - 1 :]
    drops = [a - b for a, b in itertools.pairwise(falling)]
    assert drops == pytest.approx([drops[0]] * len(drops)), "in equal steps"
    assert falling[-1] == pytest.approx(drops[0]), "the next one would be zero"


def test_ends_at_the_floor():
    for floor in (0.0, 0.1, 0.5):
        assert cosine(10_000 - 1, 10_000, 10, floor) == pytest.approx(floor, abs=1e-6)
        assert warmup_stable_decay(10_000 - 1, 10_000, 10, floor) == pytest.approx(floor, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_end_it_stays_where_it_is(kind):
    schedule = Schedule(10, 2, kind, floor=0.1)
    after = [schedule(step) for step in (10, 11, 15, 20, 100)]
    assert after == pytest.approx([1.0 if kind == "constant" else 0.1] * 5)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 2), (37, 3), (5, 1), (1, 1), (20, 20), (8, 0)])
def test_cosine_is_the_formula_of_the_first_loop(monkeypatch, steps, warmup):
    """Bit for bit: fit() runs, and the rates it hands to its optimizer are read off."""
    seen = []

    class Read(simple.torch.optim.AdamW):
        def step(self):
            seen.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(simple.torch.optim, "AdamW", Read)
    simple.fit(trainer_of().model, lambda _: stream_of(1).next_batch(), steps, learning_rate=1.0, warmup=warmup)
    assert seen == [cosine(step, steps, warmup) for step in range(steps)]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="schedule 'linear' is unknown; there are cosine, wsd, constant"):
        Schedule(10, kind="linear")


def test_a_prolonged_plateau_is_the_same_training():
    """Ten updates of a schedule of 20 and of one of 40: the same, down to the bit."""
    made = [trainer_of(config=CONFIG, schedule=Schedule(steps, 3, "wsd")).train(10) for steps in (20, 40)]
    assert all(isinstance(trainer, Trainer) for trainer in made)
    assert made[0].history == made[1].history
