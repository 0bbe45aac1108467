"""The small tasks: what is asked can be answered, and what cannot is not asked."""

import pytest
import torch

from common.data.synthetic import previous, recall, repeated


def test_a_repetition_is_one_and_its_period_varies():
    batch = repeated(64, 48, 32, seed=0)
    ids = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
    periods = set()
    for row, mask in zip(ids.tolist(), batch.loss_mask, strict=True):
        period = int(mask.long().argmax())  # the first target asked for stands at period + 1
        periods.add(period)
        assert 12 <= period <= 24
        assert all(row[t] == row[t - period] for t in range(period, len(row)))
        assert mask.tolist() == [t + 1 > period for t in range(48)]
    assert len(periods) > 8


@pytest.mark.parametrize("back", [1, 3])
def test_the_previous_token_is_the_target(back):
    batch = previous(8, 20, 32, seed=0, back=back)
    assert torch.equal(batch.targets[:, back:], batch.inputs[:, :-back])
    assert not batch.loss_mask[:, :back].any()
    assert batch.loss_mask[:, back:].all()


@pytest.mark.parametrize("pairs", [1, 4])
def test_recall_asks_for_values_that_were_shown(pairs):
    batch = recall(50, 7, 24, seed=0, pairs=pairs)
    for inputs, targets, mask in zip(batch.inputs, batch.targets, batch.loss_mask, strict=True):
        shown = dict(zip(inputs[: 2 * pairs : 2].tolist(), inputs[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(shown) == pairs
        assert mask.sum() == pairs
        for t in mask.nonzero().flatten().tolist():
            assert shown[int(inputs[t])] == int(targets[t])
        noise = inputs[2 * pairs : 2 * pairs + 7]
        assert (noise >= 16).all()
    with pytest.raises(ValueError, match="at least 27"):
        recall(2, 3, 24, seed=0, pairs=9)


def test_batches_are_a_function_of_their_seed():
    for make in (previous, repeated, recall):
        assert torch.equal(make(4, 12, 24, 5).inputs, make(4, 12, 24, 5).inputs)
        assert not torch.equal(make(4, 12, 24, 5).inputs, make(4, 12, 24, 6).inputs)
