"""The engine against loops written out, and what must not change a training: accumulation, evaluation, being watched."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from common.model.recurrent import Recurrent
from common.training.objectives import Masked, NextToken, Prefix, PreparedTokens, TokenObjective, several_documents
from common.training.schedules import Schedule
from common.training.trainer import TrainingDiverged
from tests.training.tiny import CONFIG, LENGTH, Ragged, V, equal, losses_of, stream_of, trainer_of, weights_of


class Nothing(TokenObjective):
    """No target counts."""

    def prepare(self, batch, number):
        return PreparedTokens(type(batch)(batch.inputs, batch.targets, batch.loss_mask & False, batch.document_ids))


def gradients_at_step(trainer):
    """The gradients with which an update steps, and its row."""
    seen = {}
    step = trainer.optimizers.step
    names = dict(trainer.model.named_parameters())
    trainer.optimizers.step = lambda: (seen.update({n: p.grad.clone() for n, p in names.items()}), step())
    return seen, trainer.update()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(("rows", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_is_the_full_batch(rows, accumulate, clip):
    stream = stream_of(rows, seed=2)
    counts = [int(Ragged().prepare(stream.next_batch(), 0).batch.loss_mask.sum()) for _ in range(accumulate)]
    assert len(set(counts)) > 1, "ragged"
    options = {"objective": Ragged(), "clip": clip}
    whole, row = gradients_at_step(trainer_of(stream=stream_of(8, seed=2), **options))
    pieces, same = gradients_at_step(trainer_of(stream=stream_of(rows, seed=2), accumulate=accumulate, **options))
    assert row["targets"] == same["targets"] == sum(counts)
    for name in whole:
        assert (pieces[name] - whole[name]).norm() < 1e-6 * whole[name].norm(), name
    assert same["loss"] == pytest.approx(row["loss"], rel=1e-6)
    assert same["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=1e-6)
    if clip is not None:
        assert row["gradient_norm"] > clip, "the norm is that from before clipping"
        assert float(torch.stack([g.norm() for g in pieces.values()]).norm()) == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize("kind", ["transformer", "untied", "experts", "capped", "lstm"])
def test_equals_a_loop_written_out(kind):
    changes = {"untied": {"tied": False}, "experts": {"experts": 4}, "capped": {"logit_softcap": 2.0}}.get(kind, {})
    model = Recurrent("lstm", V, 12, 2, seed=3) if kind == "lstm" else None
    ours = trainer_of(model=model, config=CONFIG.but(**changes), accumulate=2, clip=0.5, steps=6, objective=Ragged())
    theirs, stream, start = copy.deepcopy(ours.model), stream_of(), weights_of(ours.model)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    rest = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(6):
        batches = [Ragged().prepare(stream.next_batch(), 0).batch for _ in range(2)]
        count = sum(int(batch.loss_mask.sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            out = theirs(batch.inputs, document_ids=several_documents(batch.document_ids))
            mask = batch.loss_mask
            nats = F.cross_entropy(out.logits[mask], batch.targets[mask], reduction="sum")
            penalty = (out.aux or {}).get("penalty", 0.0) * mask.sum()
            ((nats + penalty) / count).backward()
            total += nats.item()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        rise, half = min(1, (step + 1) / 2), 0.55 + 0.45 * math.cos(math.pi * max(0, (step - 2) / 4))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rise * half
        optimizer.step()
        optimizer.zero_grad()
        row = ours.update()
        assert row["loss"] == pytest.approx(total / count, rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["rate"] == pytest.approx(rise * half)
    for name, p in ours.model.named_parameters():
        assert (p - theirs.get_parameter(name)).norm() < 1e-3 * (p - start[name]).norm(), name


def test_it_learns():
    trainer = trainer_of(steps=60, warmup=5, rate=3e-2).train()
    assert losses_of(trainer)[0] == pytest.approx(math.log(V), abs=0.4)
    assert losses_of(trainer)[-1] < 2.0
    assert trainer.done == 60
    assert not trainer.model.training


def test_evaluation_changes_nothing():
    seen = []

    def evaluate(model, done):
        seen.append((done, model.training))
        torch.rand(3)  # whatever it draws
        assert not torch.is_grad_enabled()
        return {"held out": float(model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum())}

    config = CONFIG.but(dropout=0.2)
    watched = trainer_of(config=config, steps=6, evaluate=evaluate, evaluate_every=1).train()
    alone = trainer_of(config=config, steps=6).train()
    assert losses_of(watched) == losses_of(alone)
    assert equal(weights_of(watched.model), weights_of(alone.model))
    assert seen == [(done, False) for done in range(7)]
    assert [row["step"] for row in watched.evaluations] == list(range(7))
    other = trainer_of(config=config, steps=6, seed=1).train()
    assert losses_of(other) != losses_of(alone), "dropout is on, and drawn by the seed"


def test_updates_are_in_training_mode():
    modes = []
    trainer = trainer_of(steps=3, evaluate=lambda model, done: {}, evaluate_every=1)
    trainer.model.blocks[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer.train()
    assert modes == [True] * 3


def test_dropout_differs_from_update_to_update():
    """The same batch and weights, another update: another loss."""
    trainer = trainer_of(config=CONFIG.but(dropout=0.5), rate=0.0, stream=stream_of(4, count=33, shuffle=False))
    rows = [trainer.update()["loss"] for _ in range(3)]
    assert len(set(rows)) == 3


def test_rows_and_when_evaluations_come():
    seen = []
    trainer = trainer_of(
        steps=7, accumulate=2, evaluate=lambda model, done: {"x": done / 2}, evaluate_every=3, watch=seen.append
    ).train()
    assert [row["step"] for row in trainer.history] == list(range(1, 8))
    assert {tuple(row) for row in trainer.history} == {("step", "loss", "gradient_norm", "rate", "targets")}
    assert all(row["targets"] == 2 * 4 * LENGTH for row in trainer.history)
    assert [row["step"] for row in trainer.evaluations] == [0, 3, 6, 7]
    assert trainer.evaluations[1] == {"step": 3, "x": 1.5}
    assert [(row["step"], "x" in row) for row in seen] == [
        (0, True), (1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True), (7, False),
        (7, True),
    ]  # fmt: skip
    before = len(seen)
    trainer.train()
    assert len(seen) == before, "nothing is left to do, and nothing is said twice"


def test_going_on_is_the_same_as_going_through():
    parts = trainer_of(kind="muon", steps=8).train(3)
    assert parts.done == 3
    parts.train()
    assert losses_of(parts) == losses_of(trainer_of(kind="muon", steps=8).train())


def test_the_schedule_counts_updates():
    schedule = Schedule(6, 3)
    trainer = trainer_of(schedule=schedule, accumulate=4).train()
    assert [row["rate"] for row in trainer.history] == [schedule(step) for step in range(6)]
    rates = [group["lr"] for group in trainer.optimizers.groups]
    assert rates == [pytest.approx(1e-2 * schedule(5))] * 3


@pytest.mark.parametrize("module", ["blocks.1.mlp", "blocks.0.attention.value", "embedding", "final_norm"])
def test_nan_in_a_module_is_named_and_nothing_is_changed(module):
    trainer = trainer_of(accumulate=2)
    for _ in range(2):
        trainer.update()
    before, steps = weights_of(trainer.model), trainer.optimizers.counters()
    state = {name: t.clone() for name, t in trainer.optimizers.state_tensors().items()}
    trainer.model.get_submodule(module).register_forward_hook(lambda _m, _i, output: output * math.nan)
    with pytest.raises(TrainingDiverged, match=rf"update 2: loss nan.*in the output of {module}; batches 4 to 5 of"):
        trainer.update()
    assert equal(weights_of(trainer.model), before)
    assert equal(trainer.optimizers.state_tensors(), state)
    assert trainer.optimizers.counters() == steps == [2, 2, 2]
    assert all(p.grad is None for p in trainer.model.parameters())
    assert len(trainer.history) == trainer.done == 2


def test_one_bad_micro_batch_is_enough():
    trainer, calls = trainer_of(accumulate=3), []
    trainer.model.blocks[0].mlp.down.register_forward_hook(
        lambda _m, _i, output: (calls.append(1), output * (math.inf if len(calls) % 3 == 2 else 1))[1]
    )
    with pytest.raises(TrainingDiverged, match="output of blocks.0.mlp.down"):
        trainer.update()


def test_nan_in_a_gradient_is_named():
    trainer = trainer_of()
    before = weights_of(trainer.model)
    trainer.model.blocks[1].attention.key.weight.register_hook(lambda g: torch.full_like(g, math.nan))
    with pytest.raises(TrainingDiverged, match="norm nan, first in the gradient of blocks.1.attention.key.weight;"):
        trainer.update()
    assert equal(weights_of(trainer.model), before)


def test_nan_in_the_loss_is_named():
    class Broken(NextToken):
        def loss(self, model, prepared):
            terms = super().loss(model, prepared)
            return terms._replace(sum=terms.sum * math.nan)

    trainer = trainer_of(objective=Broken())
    before = weights_of(trainer.model)
    with pytest.raises(TrainingDiverged, match="loss nan.*first in the loss"):
        trainer.update()
    assert equal(weights_of(trainer.model), before)


def test_a_rate_that_is_too_high_is_caught():
    trainer = trainer_of(rate=1e6, clip=None, decay=0.0, warmup=1, config=CONFIG.but(norm_placement="none"))
    with pytest.raises(TrainingDiverged):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_nothing_that_counts_is_an_error():
    trainer = trainer_of(objective=Nothing())
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match="update 0: no target counts.*loss_mask"):
        trainer.update()
    assert equal(weights_of(trainer.model), before)


def test_bits_per_byte_by_hand():
    lengths = torch.arange(V) % 4  # a special has no bytes
    trainer = trainer_of(accumulate=2, byte_lengths=lengths, objective=Ragged())
    model, stream = copy.deepcopy(trainer.model).double(), stream_of()
    total = count = 0.0
    for _ in range(2):
        batch = Ragged().prepare(stream.next_batch(), 0).batch
        logits = model(batch.inputs, document_ids=batch.document_ids).logits
        for row in range(4):
            for place in range(LENGTH):
                if batch.loss_mask[row, place]:
                    target = int(batch.targets[row, place])
                    total -= math.log2(logits[row, place].softmax(0)[target].item())
                    count += target % 4
    row = trainer.update()
    assert row["bytes"] == count
    assert row["bits_per_byte"] == pytest.approx(total / count, rel=1e-5)


def test_bf16_trains_like_fp32():
    exact = trainer_of(steps=40).train()
    narrow = trainer_of(steps=40, dtype=torch.bfloat16).train()
    assert losses_of(exact) != losses_of(narrow)
    assert losses_of(narrow)[-1] == pytest.approx(losses_of(exact)[-1], abs=0.1)
    assert {p.dtype for p in narrow.model.parameters()} == {torch.float32}
    assert all(t.dtype == torch.float32 for t in narrow.optimizers.state_tensors().values())


@pytest.mark.parametrize(
    "objective", [Masked(mask_id=30, vocab_size=V, share=0.3), Prefix()], ids=lambda o: type(o).__name__
)
def test_other_objectives_train_and_draw_anew_for_each_batch(objective):
    numbers = []

    class Spy(TokenObjective):
        def prepare(self, batch, number):
            numbers.append(number)
            return objective.prepare(batch, number)

    trainer = trainer_of(steps=70, rate=3e-2, kind="muon", objective=Spy(), accumulate=2).train()
    assert numbers == list(range(140))
    assert sum(losses_of(trainer)[-10:]) / 10 < losses_of(trainer)[0] - 0.2


def test_snapshots_need_a_tokenizer():
    with pytest.raises(ValueError, match="give tokenizer="):
        trainer_of(snapshots=object())
