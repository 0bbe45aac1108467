import math

import pytest
import torch
import torch.nn.functional as F

from common.training.loss import bits, language_model_loss, token_nats


def test_equals_torch_on_random_logits():
    logits, targets = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    loss = language_model_loss(logits, targets)
    assert loss.mean.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-5)
    assert loss.count == 15


def test_mask_leaves_out_and_sums_compose():
    logits, targets = torch.randn(4, 6, 5), torch.randint(5, (4, 6))
    mask = torch.rand(4, 6) < 0.4
    whole = language_model_loss(logits, targets, mask)
    parts = [language_model_loss(logits[i : i + 1], targets[i : i + 1], mask[i : i + 1]) for i in range(4)]
    assert sum(part.sum for part in parts).item() == pytest.approx(whole.sum.item(), rel=1e-5)
    assert sum(part.count for part in parts) == whole.count
    torch.testing.assert_close(whole.mean, whole.sum / whole.count)


def test_nothing_counts_is_zero_not_nan():
    loss = language_model_loss(torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3).bool())
    assert loss.mean == 0
    assert loss.count == 0


def test_uniform_is_log_v():
    assert token_nats(torch.zeros(1, 2, 16), torch.tensor([[3, 4]]))[0].tolist() == pytest.approx([math.log(16)] * 2)
    assert bits(token_nats(torch.zeros(1, 1, 16), torch.tensor([[3]])).item()) == pytest.approx(4.0)


def test_half_precision_logits_are_scored_in_fp32():
    logits = torch.randn(1, 4, 9).bfloat16()
    assert token_nats(logits, torch.zeros(1, 4, dtype=torch.long)).dtype == torch.float32


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="need \\(B, T, V\\) and \\(B, T\\)"):
        token_nats(torch.randn(2, 5, 7), torch.zeros(2, 4, dtype=torch.long))
