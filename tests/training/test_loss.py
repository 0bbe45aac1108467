import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.training.loss import bits, chunked_language_model_loss, language_model_loss, token_nats


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


def case(rows=3, length=7, width=6, vocabulary=29, seed=0):
    """Random hidden states, head, targets and a mask; chunks of 4 positions never divide them."""
    torch.manual_seed(seed)
    hidden, head = torch.randn(rows, length, width), torch.randn(vocabulary, width)
    return hidden, head, torch.randint(vocabulary, (rows, length)), torch.rand(rows, length) < 0.6


def plain(hidden, head, targets, mask, softcap=None):
    logits = hidden @ head.mT
    return language_model_loss(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, mask)


def gradients(loss, hidden, head, targets, mask, **options):
    """(loss, gradients of 3 x its mean + its sum), by the leaves that want one."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in (hidden, head)]
    made = loss(*leaves, targets, mask, **options)
    (3 * made.mean + made.sum).backward()
    return made, [x.grad for x in leaves]


def assert_same(case, wanted=(True, True), chunk=4, **options):
    hidden, head, targets, mask = case
    hidden, head = (x.requires_grad_(want) for x, want in zip((hidden, head), wanted, strict=True))
    whole, expected = gradients(plain, hidden, head, targets, mask, **options)
    made, found = gradients(chunked_language_model_loss, hidden, head, targets, mask, chunk=chunk, **options)
    assert made.count == whole.count
    torch.testing.assert_close(made.sum, whole.sum, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.mean, whole.mean, rtol=1e-6, atol=1e-6)
    for ours, theirs, want in zip(found, expected, wanted, strict=True):
        assert (ours is not None) == (theirs is not None) == want
        if want:
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("chunk", [1, 4, 7, 20, 21, 22, 500])
@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
def test_chunked_is_the_plain_one_with_every_gradient(chunk, softcap):
    assert_same(case(), chunk=chunk, softcap=softcap)


def test_chunked_without_a_mask_and_with_masked_chunks():
    hidden, head, targets, mask = case()
    assert_same((hidden, head, targets, None))
    mask.view(-1)[4:12] = False
    assert_same((hidden, head, targets, mask), softcap=2.0)
    nothing = chunked_language_model_loss(hidden, head, targets, mask & False)
    assert (nothing.sum, nothing.count, nothing.mean) == (0, 0, 0)
    empty = chunked_language_model_loss(hidden[:0], head, targets[:0])
    assert (empty.sum, empty.count, empty.mean) == (0, 0, 0)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["hidden", "head"])
def test_chunked_with_one_gradient(wanted):
    assert_same(case(), wanted=wanted, softcap=3.0)


def test_chunked_without_gradients():
    hidden, head, targets, mask = case()
    expected = plain(hidden, head, targets, mask).sum
    head.requires_grad_()
    with torch.no_grad():
        loss = chunked_language_model_loss(hidden, head, targets, mask, chunk=4)
    assert not loss.sum.requires_grad
    torch.testing.assert_close(loss.sum, expected)


def test_chunked_with_a_tied_head_and_large_logits():
    """The head is also the embedding of the hidden states; and exp must not overflow."""
    _, head, targets, mask = case()
    grads = []
    for loss in (plain, chunked_language_model_loss):
        leaf = (30 * head).requires_grad_()
        hidden = leaf[targets.roll(1, 1)] * 3
        made = loss(hidden, leaf, targets, mask)
        made.mean.backward()
        assert made.mean.isfinite()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm()


def test_chunked_under_autocast():
    hidden, head, targets, mask = case(6, 9, 16, 50)
    exact, found = gradients(plain, hidden.requires_grad_(), head.requires_grad_(), targets, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, expected = gradients(plain, hidden, head, targets, mask)
        made, ours = gradients(chunked_language_model_loss, hidden, head, targets, mask, chunk=4)
    assert made.sum.dtype == torch.float32
    assert made.sum.item() == pytest.approx(exact.sum.item(), rel=5e-3)
    assert made.sum.item() == pytest.approx(rough.sum.item(), rel=5e-3)
    assert made.sum.item() != exact.sum.item(), "bf16 was used"
    for one, other, best in zip(ours, expected, found, strict=True):
        assert one.dtype == torch.float32
        assert (one - best).norm() < 0.02 * best.norm()
        assert (one - best).norm() < 3 * (other - best).norm(), "about as good as the plain form"


class Largest(TorchDispatchMode):
    """Notes the most numbers in one tensor that any operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return out


def test_chunked_never_holds_all_logits():
    hidden, head, targets, mask = case(8, 32, 4, 500)
    sizes = {}
    for name, loss, options in (("plain", plain, {}), ("chunked", chunked_language_model_loss, {"chunk": 16})):
        leaves = hidden.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
        with Largest() as spy:
            loss(*leaves, targets, mask, **options).mean.backward()
        sizes[name] = spy.most
    assert sizes["plain"] == 8 * 32 * 500
    assert sizes["chunked"] <= 16 * 500


def test_chunked_shapes_must_agree():
    hidden, head, targets, _ = case()
    with pytest.raises(ValueError, match="need \\(B, T, C\\) and \\(B, T\\)"):
        chunked_language_model_loss(hidden, head, targets[:, 1:])
