"""The report finds each of many deliberate bugs where it was made, names it, and names no cause for what has none."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn

from common.model.transformer import Transformer
from common.pretrained.names import from_transformers
from common.pretrained.parity import parity_report
from tests.pretrained.bugs import (
    BUGS,
    CONFIGS,
    attending,
    first_rows,
    ids_of,
    pair,
    random_like,
    report,
    rounded,
    weight,
)

# --- no bug -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_no_divergence_where_there_is_none(family):
    found = report(family)
    assert found.first is None, str(found)
    assert (found.wrong, found.cause, found.agreement) == ([], "", 1.0)
    assert max(max(row.forced, row.free) for row in found.rows) < 1e-5
    assert found.logits < 1e-4
    assert found.losses[0] == pytest.approx(found.losses[1], rel=1e-6)
    names = [row.stage.name for row in found.rows]
    assert len(set(names)) == len(names)
    assert len(names) == {"gpt2": 30, "qwen3": 35, "mixtral": 25}.get(family, 31), names
    assert "parity: all" in str(found)


@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_passes_within_its_tolerance(family):
    theirs, ours = pair(family)
    found = parity_report(ours.bfloat16(), copy.deepcopy(theirs).bfloat16(), ids_of())
    assert found.first is None, str(found)
    assert found.tolerance == 3e-2
    assert max(row.forced for row in found.rows) > 1e-4


# --- bugs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found_where_it_is_and_named(name):
    family, bug, stage, said = BUGS[name]
    found = report(family, bug)
    assert found.first is not None
    assert found.first.stage.name == stage, str(found)
    assert said in found.cause, found.cause
    assert f"first divergence: {stage}" in str(found)
    assert f"likely cause: {found.cause}" in str(found)


def two_bugs(model):
    weight("attention.value.weight", lambda w: w.flip(0), layer=0)(model)
    weight("mlp.down.weight", lambda w: w.flip(0), layer=1)(model)


def test_two_bugs_are_both_found_and_nothing_else():
    found = report("llama", two_bugs)
    assert found.wrong == ["layer 0, value", "layer 1, MLP"]
    assert "and 1 more stages differ by themselves" in str(found)
    free = {row.stage.name: row.free for row in found.rows}
    assert free["layer 1, query"] > 1e-3, "as it runs, everything after the first differs"
    assert free["layer 0, key"] < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mixtral"])
def test_a_bug_in_one_matrix_is_the_only_stage(family):
    """Of every matrix in turn."""
    theirs, ours = pair(family)
    for i, block in enumerate(ours.blocks):
        for kind, stage in (("query", "query"), ("value", "value"), ("output", "attention")):
            matrix = getattr(block.attention, kind).weight
            old = matrix.detach().clone()
            with torch.no_grad():
                matrix.copy_(old.flip(0))
            assert parity_report(ours, theirs, ids_of(1)).wrong == [f"layer {i}, {stage}"]
            with torch.no_grad():
                matrix.copy_(old)
    assert parity_report(ours, theirs, ids_of(1)).wrong == []


# --- no false causes --------------------------------------------------------------------------------------------------

HONEST = ("other weights", "rows of our matrix", "no hypothesis fits", "other rows")


@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 3e-5])
@pytest.mark.parametrize("family", ["llama", "biases", "gpt2", "qwen3"])
def test_a_random_change_of_a_matrix_has_no_special_cause(family, size):
    paths = [
        "attention.query.weight",
        "attention.key.weight",
        "attention.output.weight",
        "mlp.up.weight",
        "mlp.down.weight",
    ]
    for path in [*paths, "head.weight", "embedding.weight"]:
        bug = weight(path, lambda w: w + size * random_like(w))
        bug = bug if family != "gpt2" or path != "head.weight" else None
        found = report(family, bug, tolerance=1e-6 if size < 1e-3 else None)
        if bug is None or found.first is None:
            continue
        assert any(said in found.cause for said in HONEST), (path, found.cause)
        assert "rounded" not in found.cause


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_a_random_change_of_anything_else_has_no_special_cause(size):
    for family, path in (
        ("llama", "mlp_norm.weight"),
        ("gpt2", "mlp_norm.weight"),
        ("mixtral", "mlp.gate"),
        ("mixtral", "mlp.router.weight"),
    ):
        found = report(family, weight(path, lambda w: w + size * random_like(w)))
        assert "other weights" in found.cause, found.cause
    for change in (
        lambda q, **more: {**more, "q": q + size * random_like(q)},
        lambda v, **more: {**more, "v": v + size * random_like(v)},
    ):
        found = report("llama", attending(change))
        assert found.cause.endswith("plainly: the computation is at fault"), found.cause


def test_weights_in_bfloat16_do_not_explain_another_bug():
    """Both sides hold numbers of bfloat16, as most published models do; ours is wrong in a row."""
    theirs = copy.deepcopy(pair("llama")[0])
    with torch.no_grad():
        rounded(theirs)
        ours = from_transformers(theirs)
        for change in (lambda w: w.flip(0), lambda w: 1.25 * w, first_rows(2, lambda w: 1.25 * w)):
            wrong = copy.deepcopy(ours)
            weight("mlp.up.weight", change)(wrong)
            found = parity_report(wrong, theirs, ids_of())
            assert found.wrong == ["layer 1, up"]
            assert "rounded" not in found.cause, found.cause


@torch.no_grad()
def test_a_guess_that_is_only_somewhat_better_is_no_cause():
    """The reference is near to numbers of bfloat16 and ours is farther off: rounding ours would halve the difference."""
    theirs = copy.deepcopy(pair("llama")[0])
    w = theirs.model.layers[1].mlp.up_proj.weight
    w.copy_(w.bfloat16() * (1 + 2e-4 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)))
    ours = from_transformers(theirs)
    moved = 1 + 4e-4 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    weight("mlp.up.weight", lambda ours: ours * moved)(ours)
    row = parity_report(ours, theirs, ids_of()).first
    found = parity_report(ours, theirs, ids_of(), tolerance=0.8 * row.forced)
    assert found.wrong == ["layer 1, up"]
    assert found.cause == "no hypothesis fits: other weights"


def test_a_norm_of_another_kind_is_not_taken_for_other_weights():
    theirs, ours = pair("llama")
    norm = copy.deepcopy(theirs.model.norm)
    with patch.object(theirs.model.norm, "forward", lambda x: norm(x) / x.abs().amax(dim=-1, keepdim=True)):
        found = parity_report(ours, theirs, ids_of())
    assert found.wrong == ["final norm"]
    assert found.cause == "no hypothesis fits: other weights, or another formula"


# --- other references -------------------------------------------------------------------------------------------------


def test_a_reference_in_another_format_is_rounding():
    theirs, ours = pair("llama")
    found = parity_report(ours, copy.deepcopy(theirs).bfloat16(), ids_of())
    assert "rounding: ours computes in torch.float32, the reference in torch.bfloat16" in found.cause


def test_a_reference_that_was_rounded_and_widened_again_is_named():
    """Its weights are the same as ours then, and its frequencies are not: they are a buffer."""
    theirs = copy.deepcopy(pair("llama")[0]).bfloat16().float()
    found = parity_report(from_transformers(theirs), theirs, ids_of())
    assert found.wrong == ["layer 0, heads", "layer 1, heads"]
    assert "the reference rounds its rotary frequencies to torch.bfloat16" in found.cause


def test_a_wrong_reference_is_told_from_a_wrong_model():
    theirs, ours = pair("llama")
    theirs = copy.deepcopy(theirs)
    theirs.model.layers[1].post_attention_layernorm.variance_epsilon = 1e-3
    found = parity_report(ours, theirs, ids_of())
    assert found.wrong == ["layer 1, MLP norm"]
    assert "the reference adds epsilon 0.001, ours 1e-05" in found.cause
    theirs = copy.deepcopy(pair("gpt2")[0])
    theirs.transformer.h[0].mlp.act = nn.ReLU()
    found = parity_report(pair("gpt2")[1], theirs, ids_of())
    assert "the reference applies relu, ours gelu_tanh" in found.cause


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_other_module_names_are_named_and_no_hook_stays():
    theirs, ours = pair("llama")
    theirs = copy.deepcopy(theirs)
    theirs.model.layers[1].self_attn.o_project = theirs.model.layers[1].self_attn.o_proj
    del theirs.model.layers[1].self_attn.o_proj
    with pytest.raises(ValueError, match=r"no module 'model\.layers\.1\.self_attn\.o_proj', which layer 1, heads is"):
        parity_report(ours, theirs, ids_of())
    assert (hooks_of(ours), hooks_of(theirs)) == (0, 0)
    with pytest.raises(ValueError, match="no module 'model.embed_tokens'"):
        parity_report(ours, pair("gpt2")[0], ids_of())


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_hooks_are_removed_afterwards_also_on_error(side):
    theirs, ours = pair("mistral")
    parity_report(ours, theirs, ids_of())
    assert (hooks_of(ours), hooks_of(theirs)) == (0, 0)
    broken = ours.final_norm if side == "ours" else theirs.model.norm
    with patch.object(broken, "forward", lambda x: 1 / 0), pytest.raises(ZeroDivisionError):
        parity_report(ours, theirs, ids_of())
    assert (hooks_of(ours), hooks_of(theirs)) == (0, 0)


def test_neither_model_is_changed():
    theirs, ours = pair("qwen3")
    before = [tensor.clone() for model in (theirs, ours) for tensor in model.state_dict().values()]
    logits = ours(ids_of()).logits
    report("qwen3")
    parity_report(ours, theirs, ids_of())
    after = [tensor for model in (theirs, ours) for tensor in model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(ours(ids_of()).logits, logits)
    assert logits.requires_grad


def test_a_model_of_another_size_is_said_not_raised():
    theirs, ours = pair("llama")
    wider = ours.config.but(hidden_width=48)
    with torch.no_grad():
        made = Transformer(wider).eval()
        made.embedding.load_state_dict(ours.embedding.state_dict())
        made.blocks[0].attention.load_state_dict(ours.blocks[0].attention.state_dict())
        for name in ("attention_norm", "mlp_norm"):
            getattr(made.blocks[0], name).load_state_dict(getattr(ours.blocks[0], name).state_dict())
    found = parity_report(made, theirs, ids_of())
    assert found.first.stage.name == "layer 0, gate"
    assert "shapes: ours is (2, 40, 48), theirs (2, 40, 40)" in found.cause


def test_the_report_can_be_read():
    text = str(report("llama", two_bugs))
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["stage", "forced"]
    kinds = [line.split("  ")[0] for line in lines[1:-3]]
    assert kinds[:3] == ["embedding", "start of the stream", "layer 0, attention norm"]
    assert len(kinds) == len(set(kinds)) < 20
    assert "layer 0, value" in kinds
    assert "layer 1, MLP" in kinds, "one line for each kind of stage: the worst"
    assert lines[-3].startswith("logits differ by at most")
    assert max(map(len, lines)) < 140
