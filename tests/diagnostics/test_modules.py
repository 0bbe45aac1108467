"""Probes of modules: no alarm on other people's healthy models, an alarm where something is broken on purpose."""

import copy

import pytest
import torch
import transformers

from common.diagnostics.doctor import doctor
from common.diagnostics.handles import handles_of
from common.diagnostics.probes import modules
from common.model.config import ModelConfig
from common.model.recurrent import Recurrent
from common.model.transformer import Transformer

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
THEIRS = {
    "gpt2": transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, bos_token_id=None,
        eos_token_id=None,
    ),
    "llama": transformers.LlamaConfig(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE),
}  # fmt: skip
OURS = {"rope": {}, "window": {"window": 4}, "learned": {"positions": "learned"}, "alibi": {"positions": "alibi"}}
SEEN = {
    "repeatable", "future-perturbation", "cross-row", "parameters-move", "padding-invariance", "documents-apart",
    "cached-equals-uncached", "rows-sum-to-one", "mass-on-the-future", "gradient-by-depth",
}  # fmt: skip


@pytest.mark.parametrize("family", THEIRS)
def test_no_false_alarm_on_models_of_transformers(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(THEIRS[family], attn_implementation="eager").eval()
    found = doctor(**handles_of(model))
    assert found.healthy, str(found)
    assert set(found.readings) == SEEN


@pytest.mark.parametrize("kind", OURS)
def test_no_false_alarm_on_ours(kind):
    config = ModelConfig(vocab_size=40, layers=2, width=32, heads=4, key_value_heads=2, init="fan_in", **OURS[kind])
    found = doctor(Transformer(config))
    assert found.healthy, str(found)
    assert set(found.readings) >= SEEN | {"poisoned-padding", "cache-overflow"}


def test_a_plain_module_gets_what_needs_no_more():
    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(40, 40)

        def forward(self, ids):
            return self.table(ids)

    found = doctor(Bigram(), 40)
    assert set(found.readings) == {"repeatable", "future-perturbation", "cross-row", "parameters-move"}
    assert found.readings["parameters-move"].value == 0  # one table, used
    assert not doctor(Recurrent("lstm", 40, width=8)).readings["padding-invariance"].caught


def broken_padding(model):
    return lambda ids, pads: model(ids)


def test_probes_see_what_they_are_for():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(THEIRS["llama"], attn_implementation="eager").eval()
    healthy = handles_of(model, untrained=True)
    for name, handle, probe in (
        ("padding ignored", {"padded": broken_padding(model)}, modules.padding_invariance),
        ("documents ignored", {"packed": broken_padding(model)}, modules.documents_apart),
        ("no cache", {"open_cache": lambda batch: lambda ids: model(ids).logits}, modules.cached_equals_uncached),
        ("never full", {"bounded_cache": lambda capacity: lambda ids: model(ids).logits}, modules.cache_overflow),
        ("scaled maps", {"attention_maps": lambda ids: [torch.ones(1, 1, 9, 9)]}, modules.rows_sum_to_one),
        ("future mass", {"attention_maps": lambda ids: [torch.full((1, 1, 9, 9), 1e-9)]}, modules.mass_on_the_future),
        ("knows too much", {"untrained": lambda ids: 50 * torch.eye(40)[ids]}, modules.loss_at_init),
        ("forgets", {"model": lambda ids: torch.eye(40)[ids], "memory": 2}, modules.past_matters),
    ):
        assert probe.examine({**healthy, **handle})[0].caught, name
    frozen = copy.deepcopy(model)
    frozen.model.layers[1].mlp.down_proj.weight.data.zero_()
    reading = modules.parameters_move.examine(handles_of(frozen))[0]
    assert reading.caught
    assert "gate_proj" in reading.note
    frozen.model.norm.weight.data[0] = torch.nan
    assert modules.parameters_move.examine(handles_of(frozen))[0].caught


NAN = float("nan")


def nan_from(model, column):
    """A model whose logits are NaN from a column on."""

    def spoiled(ids, *_):
        logits = model(ids).logits.clone()
        logits[:, column:] = NAN
        return logits

    return spoiled


def test_nan_is_never_lost_on_the_way_to_a_reading():
    model = Transformer(ModelConfig(vocab_size=40, layers=2, width=16, heads=2, init="fan_in")).eval()
    healthy = handles_of(model, untrained=True)
    maps = lambda ids: [torch.eye(10).expand(4, 1, 10, 10), torch.full((4, 1, 10, 10), NAN)]  # noqa: E731
    states = [("a", torch.full((2, 3), NAN)), ("b", torch.ones(2, 3))]

    def spoiled_step(batch):
        step = healthy["open_cache"](batch)
        return lambda ids: step(ids) * (NAN if ids.shape[1] == 1 else 1.0)

    for probe, handles in (
        (modules.attend_parity, {"attend": lambda q, k, v: q * NAN}),
        (modules.cached_equals_uncached, {"open_cache": spoiled_step}),
        (modules.padding_invariance, {"padded": nan_from(model, 5)}),
        (modules.documents_apart, {"packed": nan_from(model, 5)}),
        (modules.rows_sum_to_one, {"attention_maps": maps}),
        (modules.mass_on_the_future, {"attention_maps": maps}),
        (modules.rotation, {"rotate_at": lambda x, p: x * (NAN if p > 256 else 1.0)}),
        (modules.layer_parity, {"hidden": lambda ids: states, "reference_hidden": lambda ids: states[1:] * 2}),
    ):
        assert probe.examine({**healthy, **handles})[0].caught, probe.name


def test_an_error_before_the_cache_is_full_is_not_taken_for_the_right_one():
    reading = modules.cache_overflow.examine({"bounded_cache": lambda n: lambda ids: 1 / 0, "vocab_size": 9})[0]
    assert reading.caught


def test_the_floor_is_not_crossed_by_a_model_that_reads_the_past_only():
    model = Transformer(ModelConfig(vocab_size=31, layers=1, width=16, heads=2, init="fan_in"))
    assert not modules.entropy_floor.examine({"untrained": model, "vocab_size": 31})[0].caught


def test_first_divergence_is_named():
    states = [("embedding", torch.ones(2, 3)), ("block 0", torch.ones(2, 3)), ("block 1", torch.ones(2, 3))]
    other = [*states[:1], ("block 0", torch.full((2, 3), 1.01)), ("block 1", torch.full((2, 3), 2.0))]
    handles = {"hidden": lambda ids: states, "reference_hidden": lambda ids: other, "vocab_size": 9}
    assert modules.layer_parity.examine(handles)[0].note.endswith("block 0")
    handles["reference_hidden"] = handles["hidden"]
    assert not modules.layer_parity.examine(handles)[0].caught
