"""The smallest loop against torch written out, and the studies that use it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data.synthetic import previous
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.studies import attending, depth
from common.training.fit import fit

TINY = ModelConfig(vocab_size=16, context_length=16, layers=1, width=16, heads=2, init="fan_in", tied=False)


def batch_at(step):
    return previous(4, 12, 16, step)


def test_a_step_is_that_of_torch_written_out():
    ours, theirs = Transformer(TINY), Transformer(TINY)
    found = fit(ours, batch_at, 5, learning_rate=1e-2, warmup=2, weight_decay=0.1, clip=0.5)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    rates = [
        5e-3,
        1e-2,
        1e-2,
        1e-2 * (0.55 + 0.45 * math.cos(math.pi / 3)),
        1e-2 * (0.55 + 0.45 * math.cos(2 * math.pi / 3)),
    ]
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        batch = batch_at(step)
        loss = F.cross_entropy(theirs(batch.inputs).logits[batch.loss_mask], batch.targets[batch.loss_mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert found.losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert found.tokens == 5 * 4 * 12


def test_divergence_is_noted_and_stops():
    model = Transformer(TINY)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    found = fit(model, batch_at, 5)
    assert found.diverged_at == 0
    assert len(found.losses) == 1


def test_the_penalty_of_a_model_is_trained():
    plain, routed = (Transformer(TINY.but(experts=4, balance_loss=weight)) for weight in (0.0, 5.0))
    for model in (plain, routed):
        fit(model, batch_at, 60, learning_rate=1e-2)
    inputs = previous(64, 12, 16, 999).inputs
    uneven = [float(model(inputs).aux["load"].std()) for model in (plain, routed)]
    assert uneven[1] < uneven[0]


def test_watching_sees_every_step_in_training_mode_and_the_end_is_evaluation():
    seen = []
    model = Transformer(TINY).eval()
    fit(model, batch_at, 3, watch=lambda step: seen.append((step, model.training)))
    assert seen == [(0, True), (1, True), (2, True), (3, True)]
    assert not model.training


def test_documents_of_a_batch_are_kept_apart():
    batch = batch_at(0)
    packed = dataclasses.replace(batch, document_ids=(torch.arange(12) // 5).expand(4, 12))
    losses = [fit(Transformer(TINY), lambda _, b=b: b, 1).losses[0] for b in (batch, packed)]
    assert losses[0] != losses[1]
    expected = Transformer(TINY)(packed.inputs, document_ids=packed.document_ids).logits
    by_hand = F.cross_entropy(expected[packed.loss_mask], packed.targets[packed.loss_mask])
    assert losses[1] == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_held_out_windows_come_from_other_text():
    text = depth.Bytes(np.zeros(500, dtype=np.uint8), np.ones(500, dtype=np.uint8))
    assert text.batch(0).inputs.unique().tolist() == [0]
    assert text.batch(0, held_out=True).inputs.unique().tolist() == [1]


def test_a_layer_with_rotary_positions_learns_order_and_one_without_does_not():
    test = previous(64, 32, attending.VOCABULARY, attending.UNSEEN)
    learned = {
        kind: attending.scored([attending.learn_order(kind, steps=150)[0]], test).mean for kind in ("rope", "none")
    }
    assert learned["rope"] > 0.9
    assert learned["none"] < 0.35


def test_gradients_grow_towards_the_bottom_without_residuals():
    text = depth.Bytes.of_plays()
    batch = text.batch(0, 2)
    ratios = {}
    for name, changes in (("with", {}), ("without", {"residual": False})):
        signal, gradient = depth.norms_by_depth(depth.BASE.but(layers=12, **changes), batch)
        assert len(signal) == len(gradient) == 13
        ratios[name] = gradient[0] / gradient[-1]
    assert ratios["without"] > 10 * ratios["with"]


def test_equal_arithmetic_and_windows_of_text():
    assert depth.equal_steps(depth.BASE, 100) == 100
    assert depth.equal_steps(depth.BASE.but(mlp="none"), 100) > 150
    text = depth.Bytes.of_plays()
    assert torch.equal(text.batch(3).inputs, text.batch(3).inputs)
    assert not torch.equal(text.batch(3).inputs, text.batch(4).inputs)
    batch = text.batch(3)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert 3.2 < depth.unigram_nats(text) < 3.5
    for changes in depth.PARTS.values():
        depth.BASE.but(**changes)
