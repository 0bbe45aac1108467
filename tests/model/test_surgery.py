"""Replacing linear modules: which, in how many places, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from common.model.config import ModelConfig
from common.model.surgery import replace_linears, weight_of
from common.model.transformer import Transformer
from tests.model.adapters import Low, Subclassed, adapted

TINY = ModelConfig(vocab_size=23, context_length=16, layers=2, width=16, heads=4, init="fan_in")
IDS = torch.arange(20).view(2, 10)


class Doubled(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.base = linear

    def forward(self, x):
        return 2 * self.base(x)


def names_of(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def test_every_linear_is_replaced_once_and_named():
    model = Transformer(TINY.but(tied=False))
    expected = names_of(model)
    seen = []
    names = replace_linears(model, lambda name, linear: seen.append((name, linear)) or Doubled(linear))
    assert names == expected == [name for name, _ in seen]
    assert all(isinstance(model.get_submodule(name), Doubled) for name in names)
    assert all(model.get_submodule(name).base is linear for name, linear in seen)
    assert names_of(model) == [f"{name}.base" for name in expected]


def test_where_chooses_by_name_and_module():
    model = Transformer(TINY)
    chosen = replace_linears(
        model, lambda name, linear: Doubled(linear), lambda name, m: "mlp" in name and m.in_features == 16
    )
    assert chosen == [f"blocks.{i}.mlp.{part}" for i in range(2) for part in ("gate", "up")]
    assert replace_linears(model, lambda name, linear: Doubled(linear), lambda name, module: False) == []


@torch.no_grad()
def test_the_function_is_that_of_the_new_modules():
    model, right = Transformer(TINY.but(tied=False), seed=1), Transformer(TINY.but(tied=False), seed=1)
    for name in names_of(right):
        right.get_submodule(name).weight.mul_(2)
    replace_linears(model, lambda name, linear: Doubled(linear))
    assert torch.equal(model(IDS).logits, right(IDS).logits)


def test_a_tied_head_is_a_decision():
    with pytest.raises(ValueError, match=r"head shares its weight.*tied='keep'.*tied='replace'"):
        replace_linears(Transformer(TINY), lambda name, linear: Doubled(linear))
    kept = Transformer(TINY)
    assert "head" not in replace_linears(kept, lambda name, linear: Doubled(linear), tied="keep")
    assert kept.head.weight is kept.embedding.weight
    wrapped = Transformer(TINY)
    assert replace_linears(wrapped, lambda name, linear: Doubled(linear), tied="replace")[-1] == "head"
    assert wrapped.head.base.weight is wrapped.embedding.weight, "a wrapper keeps the tie"
    assert replace_linears(Transformer(TINY), lambda name, linear: Doubled(linear), lambda name, _: name != "head")


def test_an_adapter_that_subclasses_is_refused_and_nothing_is_changed():
    model = Transformer(TINY.but(tied=False))
    model.blocks[1].mlp.up = Subclassed(model.blocks[1].mlp.up)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"blocks.1.mlp.up is a LowRankLinear.*a, b of its own.*\.base.*merge.*where"):
        replace_linears(model, lambda name, linear: Doubled(linear))
    assert dict(model.named_modules()) == before
    names = replace_linears(model, lambda name, linear: Doubled(linear), lambda name, _: name != "blocks.1.mlp.up")
    assert len(names) == 14


def test_an_error_of_make_leaves_the_model_as_it_was():
    model = Transformer(TINY.but(tied=False))
    before = dict(model.named_modules())

    def make(name, linear):
        if name.startswith("blocks.1"):
            raise RuntimeError("not here")
        return Doubled(linear)

    with pytest.raises(RuntimeError, match="not here"):
        replace_linears(model, make)
    assert dict(model.named_modules()) == before


def test_a_subclass_without_parameters_of_its_own_is_left_alone():
    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x).round()

    model = nn.Sequential(Rounded(3, 3), nn.Linear(3, 3))
    assert replace_linears(model, lambda name, linear: Doubled(linear)) == ["1"]


def test_a_module_in_two_places_stays_one():
    linear = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})
    assert replace_linears(model, lambda name, linear: Doubled(linear)) == ["a", "b.0"]
    assert model["a"] is model["b"][0]


def test_adapters_wrap_and_can_be_wrapped_over():
    """Also what is inside an adapter can be replaced, and the adapter keeps its part."""
    model = adapted(Transformer(TINY, seed=1), "query", "up")
    before = model(IDS).logits
    twice = copy.deepcopy(model)
    names = replace_linears(twice, lambda name, linear: Low(linear), tied="keep")
    assert "blocks.0.mlp.up.base" in names
    assert torch.equal(twice(IDS).logits, before), "a new adapter is zero"


@torch.no_grad()
def test_the_weight_of_whatever_stands_there():
    linear, x = nn.Linear(5, 7, bias=False), torch.randn(2, 5)
    assert weight_of(linear, x) is linear.weight
    assert torch.equal(weight_of(Doubled(linear), x), 2 * linear.weight)
    low = Low(linear)
    low.b.normal_()
    torch.testing.assert_close(x @ weight_of(low, x).T, low(x))


def test_latent_attention_decodes_with_an_adapter_on_its_up_matrix():
    """The absorbed form takes the matrix itself: it must be the adapted one."""
    config = TINY.but(attention="latent", latent_width=6, rope_head_width=4, value_head_width=5)
    model = adapted(Transformer(config, seed=1), "attention.up").eval()
    assert isinstance(model.blocks[0].attention.up, Low)
    with torch.no_grad():
        whole, cache = model(IDS).logits, model.new_cache(2)
        steps = torch.cat([model(IDS[:, :4], cache=cache).logits, model(IDS[:, 4:], cache=cache).logits], dim=1)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)
