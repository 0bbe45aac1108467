"""The recurrent cells against torch's modules, and their state against documents and padding."""

import pytest
import torch

from common.model.recurrent import Recurrent


def ids_of(rows=3, length=8, seed=0):
    return torch.randint(19, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
@pytest.mark.parametrize("layers", [1, 2])
def test_equal_to_torch_in_output_and_every_gradient(kind, layers):
    ours = Recurrent(kind, 19, width=10, layers=layers)
    theirs = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM}[kind](10, 10, layers, batch_first=True)
    names = {
        "weight_ih": "input.weight",
        "bias_ih": "input.bias",
        "weight_hh": "recurrent.weight",
        "bias_hh": "recurrent.bias",
    }
    pairs = [
        (getattr(theirs, f"{name}_l{i}"), ours.get_parameter(f"layers.{i}.{path}"))
        for i in range(layers)
        for name, path in names.items()
    ]
    with torch.no_grad():
        for there, here in pairs:
            here.add_(0.1 * torch.randn(here.shape, generator=torch.Generator().manual_seed(1)))
            there.copy_(here)
    mine, other = ours(ids_of()).logits, ours.head(theirs(ours.embedding(ids_of()))[0])
    torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)
    here = torch.autograd.grad(mine.square().sum(), [b for _, b in pairs])
    there = torch.autograd.grad(other.square().sum(), [a for a, _ in pairs])
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_documents_start_fresh_and_padding_is_passed_over(kind):
    model, ids = Recurrent(kind, 19, width=10), ids_of(1)
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])
    apart = torch.cat([model(ids[:, :3]).logits, model(ids[:, 3:]).logits], dim=1)
    torch.testing.assert_close(model(ids, document_ids=documents).logits, apart)
    assert not torch.allclose(model(ids).logits[:, 3:], apart[:, 3:])
    pads = torch.tensor([[True, True, False, False, True, False, False, True]])
    real = model(ids[~pads][None]).logits
    torch.testing.assert_close(model(ids, pad_mask=pads).logits[~pads][None], real)


def test_the_forget_gate_starts_open_and_kinds_are_named():
    for bias, kept in ((0.0, 0.5), (1.0, 0.731)):
        layer = Recurrent("lstm", 19, width=10, forget_bias=bias).layers[0]
        assert layer.input.bias[10:20].sigmoid().mean().item() == pytest.approx(kept, abs=1e-3)
        assert layer.input.bias[:10].abs().max() == 0
    with pytest.raises(ValueError, match="there are rnn, lstm"):
        Recurrent("gru", 19)
