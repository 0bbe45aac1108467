"""bf16 by rounding: the same as torch's own bf16 products, forward and backward, to the last bit of bf16."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data.stream import RandomWindows
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.training.loss import chunked_language_model_loss
from common.training.quick import quick_training
from common.training.rounding import rounded_products
from common.training.trainer import Settings


def made(product, rounded):
    """(result, gradients of the operands)."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 7, 16, generator=generator), torch.randn(9, 16, generator=generator)
    left, right = left.requires_grad_(), right.requires_grad_()
    slope = torch.randn(5, 7, 9, generator=generator)
    with rounded_products() if rounded else torch.autocast("cpu", dtype=torch.bfloat16):
        out = product(left, right)
    out.float().backward(slope)
    return out.float(), left.grad, right.grad


@pytest.mark.parametrize("product", [F.linear, lambda x, w: x @ w.mT, lambda x, w: torch.matmul(x, w.mT)])
def test_a_product_is_that_of_bf16(product):
    for ours, theirs in zip(made(product, True), made(product, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)
    out = made(product, True)[0]
    assert torch.equal(out, out.bfloat16().float())
    exact = made(lambda x, w: F.linear(x.double(), w.double()), True)[0]
    assert 1e-4 < (out - exact).abs().max() < 0.1  # it does round


def test_the_whole_model_is_within_bf16_of_itself_and_a_mask_is_left_alone():
    ids = torch.randint(0, 32, (2, 24), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(24) // 8).expand(2, -1)
    model = Transformer(ModelConfig(vocab_size=32, context_length=24, layers=2, width=32, heads=2), seed=1)
    plain = model(ids, document_ids=documents).logits
    with rounded_products():
        rounded = model(ids, document_ids=documents).logits
    assert 0 < (plain - rounded).abs().max() < 0.05 * plain.std() + 0.02
    assert torch.equal(model(ids, document_ids=documents).logits, plain)  # outside the block nothing is rounded


def test_the_loss_that_never_holds_its_logits_is_rounded_as_well():
    hidden, head = torch.randn(2, 6, 16), torch.randn(40, 16)
    targets = torch.randint(40, (2, 6))
    plain = chunked_language_model_loss(hidden, head, targets).sum
    with rounded_products():
        rounded = chunked_language_model_loss(hidden, head, targets).sum
    assert plain != rounded
    torch.testing.assert_close(plain, rounded, rtol=0.02, atol=0.0)


def test_a_training_with_rounded_products_is_near_one_in_bf16_and_evaluates_without():
    losses = {}
    for name, settings in {
        "bf16": Settings(dtype=torch.bfloat16),
        "rounded": Settings(rounded=True),
        "fp32": Settings(),
    }.items():
        tokens = np.random.default_rng(0).integers(0, 32, 4000)
        model = Transformer(ModelConfig(vocab_size=32, context_length=16, layers=2, width=32, heads=2), seed=1)
        seen = []

        def look(model, done, seen=seen):
            seen.append(float(model(torch.arange(16)[None]).logits.sum()))
            return {}

        trainer = quick_training(
            model, RandomWindows(tokens, length=16, batch_size=8), 12, settings=settings, evaluate=look
        )
        losses[name] = [row["loss"] for row in trainer.train().history]
        assert seen[-1] == float(model(torch.arange(16)[None]).logits.detach().sum())
    assert losses["rounded"] != losses["fp32"]
    assert losses["rounded"] == pytest.approx(losses["bf16"], abs=0.02)
