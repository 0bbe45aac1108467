"""Packed matrices: the same numbers as the model they were made from, which stays as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.generation import prepacked as module
from common.generation.engine import Engine
from common.generation.prepacked import PrepackedLinear, can_prepack, prepacked
from common.generation.sampling import SamplingParams
from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.training.checkpoint import model_fingerprint, save_checkpoint
from tests.generation.letters import RAGGED, Letters, model_of
from tests.model.adapters import Subclassed, adapted

V = 37
GPT2 = {"positions": "learned", "norm": "layer", "mlp": "gelu_tanh", "attention_bias": True, "mlp_bias": True}
SHAPES = {
    "plain": {},
    "untied": {"tied": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "key_value_heads": 2},
    "odd widths": {"head_width": 10, "hidden_width": 23, "qk_norm": True, "output_bias": True},
    "experts": {"experts": 4},
    "gpt2": GPT2,
    "latent": {"attention": "latent", "latent_width": 6, "rope_head_width": 4, "value_head_width": 5},
}
by_shape = pytest.mark.parametrize("shape", SHAPES)
needs_operators = pytest.mark.skipif(not can_prepack(), reason="this torch cannot pack")


def made(shape, seed=0):
    """A model with every parameter random, biases and norms as well."""
    config = ModelConfig(vocab_size=V, context_length=64, layers=2, width=24, heads=4, **SHAPES[shape], init="fan_in")
    model = Transformer(config, seed=seed).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
        model.embedding.weight.normal_()
    return model


def ids_of(rows, length, seed=0):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


@needs_operators
@by_shape
@torch.no_grad()
def test_logits_are_those_of_the_model(shape):
    model = made(shape)
    fast = prepacked(model)
    left = [name.rpartition(".")[2] for name, m in fast.named_modules() if isinstance(m, nn.Linear)]
    assert left == (["up"] * 2 if shape == "latent" else []), "needed as it is, one head at a time"
    count = sum(isinstance(m, nn.Linear) for m in model.modules()) - len(left)
    assert sum(isinstance(m, PrepackedLinear) for m in fast.modules()) == count > 0
    for rows in (1, 2, 16, 33):
        for length in (1, 9):
            ids = ids_of(rows, length)
            torch.testing.assert_close(fast(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-5)


@needs_operators
@by_shape
def test_the_model_stays_as_it_was_and_can_be_trained(shape):
    model, ids = made(shape), ids_of(2, 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    model.train()
    fast = prepacked(model)
    assert model.training
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    logits = model(ids).logits
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(fast(ids).logits, prepacked(model)(ids).logits), "a gradient changes no copy"


@needs_operators
@pytest.mark.parametrize("shape", ["plain", "untied", "experts"])
def test_what_is_not_packed_is_shared(shape):
    model = made(shape)
    fast = prepacked(model)
    mine = dict(model.named_parameters())
    found = dict(fast.named_parameters())
    assert found["embedding.weight"].data_ptr() == mine["embedding.weight"].data_ptr()
    assert all(found[name].data_ptr() == mine[name].data_ptr() for name in found)
    assert {name.rpartition(".")[0] for name in set(mine) - set(found)} <= {
        name for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }


@needs_operators
@pytest.mark.parametrize("shape", ["biases", "gpt2", "experts", "latent"])
def test_the_engine_writes_the_same(shape):
    model, greedy = made(shape), SamplingParams(temperature=0, max_tokens=30, logprobs=True)

    class Words(Letters):
        vocab_size = V

        def token_bytes(self, token_id):
            return b"" if token_id == self.specials["<|endoftext|>"] else bytes([97 + token_id % 26])

    prompts = [ids_of(1, length, seed=length)[0].tolist() for length in (3, 11, 1, 20)]
    slow = Engine(model, Words()).generate(prompts, greedy)
    for cached in (True, False):
        fast = Engine(prepacked(model), Words(), cached=cached).generate(prompts, greedy)
        for (a,), (b,) in zip(slow, fast, strict=True):
            assert a.ids == b.ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert len({tuple(a.ids) for (a,) in slow}) > 1


@needs_operators
def test_samples_over_the_end_of_the_context():
    model, params = model_of(), SamplingParams(max_tokens=20, n=3, seed=3)
    slow, fast = (Engine(m, Letters()).generate(RAGGED, params) for m in (model, prepacked(model)))
    assert [[c.text for c in row] for row in slow] == [[c.text for c in row] for row in fast]


@needs_operators
@pytest.mark.parametrize("shape", ["plain", "biases", "experts"])
@torch.no_grad()
def test_in_bfloat16(shape):
    model = made(shape).bfloat16()
    exact, ids = made(shape), ids_of(16, 9)
    fast = prepacked(model)
    assert fast(ids).logits.dtype == torch.bfloat16
    expected = exact(ids).logits
    near = 0.05 * float(expected.abs().max())
    assert float((model(ids).logits - expected).abs().max()) < near
    assert float((fast(ids).logits - expected).abs().max()) < near


@torch.no_grad()
def test_a_format_that_cannot_be_packed_stays_the_model():
    model = made("plain").double()
    assert prepacked(model) is model
    assert model(ids_of(1, 3)).logits.dtype == torch.float64


def test_another_torch_stays_the_model(monkeypatch):
    model = made("plain")
    monkeypatch.setattr(module, "can_prepack", lambda: False)
    assert prepacked(model) is model
    assert all(p.requires_grad for p in model.parameters())


@needs_operators
def test_what_is_packed_already_stays():
    fast = prepacked(made("biases"))
    assert prepacked(fast) is fast


@needs_operators
@by_shape
def test_the_fingerprint_sees_every_weight(shape):
    """Two models over one embedding must not pass for each other because their matrices lie in another layout."""
    model = made(shape)
    first = model_fingerprint(prepacked(model))
    assert first == model_fingerprint(prepacked(made(shape))), "a function of the weights"
    for name, parameter in model.named_parameters():
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.flatten()[-1] += 1
        assert model_fingerprint(prepacked(model)) != first, name
        with torch.no_grad():
            parameter.copy_(saved)
    assert model_fingerprint(prepacked(model)) == first


@needs_operators
def test_prepacking_keeps_no_weight_twice():
    fast = prepacked(made("untied"))
    one = next(m for m in fast.modules() if isinstance(m, PrepackedLinear))
    assert sum(t.numel() for t in one.state_dict().values()) == 32
    assert one.weight_digest is one.weight_digest


@needs_operators
@torch.no_grad()
def test_adapters_survive_and_those_that_subclass_are_refused():
    model, ids = adapted(made("plain"), "query", "down"), ids_of(2, 9)
    plain = made("plain")(ids).logits
    right = model(ids).logits
    assert float((right - plain).abs().max()) > 0.1
    torch.testing.assert_close(prepacked(model)(ids).logits, right, atol=1e-4, rtol=1e-5)
    model = made("plain")
    model.blocks[0].attention.query = Subclassed(model.blocks[0].attention.query)
    with pytest.raises(ValueError, match="blocks.0.attention.query is a LowRankLinear"):
        prepacked(model)


@needs_operators
@torch.no_grad()
def test_latent_attention_decodes_from_its_cache():
    """The absorbed form takes the matrix `up` itself."""
    model, ids = made("latent"), ids_of(2, 9)
    fast = prepacked(model)
    cache = fast.new_cache(2)
    steps = torch.cat([fast(part, cache=cache).logits for part in (ids[:, :4], ids[:, 4:])], dim=1)
    torch.testing.assert_close(steps, model(ids).logits, atol=1e-4, rtol=1e-5)


@needs_operators
def test_a_prepacked_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded again.*before it is prepacked"):
        save_checkpoint(tmp_path, prepacked(made("plain")), Letters())
    assert not list(tmp_path.iterdir())
