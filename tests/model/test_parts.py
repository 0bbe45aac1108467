"""Norms, activations, positions, mixtures, initialisation, cost: each against an independent count or form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.model.config import PRESETS, ModelConfig
from common.model.mlp import ACTIVATIONS, MLP, MixtureOfExperts
from common.model.norms import Norm, layer_norm, rms_norm
from common.model.positions import (
    alibi_slopes,
    rope_angles,
    rope_frequencies,
    rotate,
    sinusoidal_table,
    to_half_layout,
    turn,
    wide,
)
from common.model.transformer import Transformer

SMALL = ModelConfig(vocab_size=31, context_length=24, layers=3, width=16, heads=4)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids_of(rows=2, length=9, seed=0):
    return torch.randint(31, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_fused_norm_is_the_formula_in_output_and_gradients(kind):
    module = Norm(kind, 10, 1e-3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(random(10, seed=1))
    x = (3 + 2 * random(4, 10)).requires_grad_()
    formula = layer_norm(x, module.weight, module.bias, 1e-3) if kind == "layer" else rms_norm(x, module.weight, 1e-3)
    torch.testing.assert_close(module(x), formula, atol=1e-6, rtol=1e-5)
    inputs = [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad(module(x).pow(3).sum(), inputs),
        torch.autograd.grad(formula.pow(3).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    normed = Norm(kind, 10, 0.0)(x)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(4))
    if kind == "layer":
        torch.testing.assert_close(normed.mean(-1), torch.zeros(4), atol=1e-6, rtol=0)


def test_activations_against_their_definitions():
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    expected = {
        "gelu": x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": x.clamp(min=0),
        "relu2": x.clamp(min=0) ** 2,
        "swiglu": x / (1 + torch.exp(-x)),
    }
    assert set(expected) == set(ACTIVATIONS)
    for name, values in expected.items():
        torch.testing.assert_close(ACTIVATIONS[name](x), values, atol=1e-12, rtol=1e-9)
    assert 1e-4 < float((expected["gelu"] - expected["gelu_tanh"]).abs().max()) < 5e-4


def test_gated_mlp_costs_about_what_the_plain_one_does():
    weights = [sum(p.numel() for p in MLP(SMALL.but(width=96, mlp=kind)).parameters()) for kind in ("swiglu", "gelu")]
    assert weights[0] == weights[1]


def test_rotary_products_depend_on_the_distance_alone():
    config = SMALL.but(width=64)
    frequencies, _ = rope_frequencies(config)
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)
    for layout in ("half", "interleaved"):

        def product(at, to, layout=layout):
            turned = [
                rotate(x, *(part[None, None, None] for part in rope_angles(torch.tensor(p), frequencies)), layout)
                for x, p in ((q, at), (k, to))
            ]
            return float((turned[0] * turned[1]).sum())

        assert product(5, 3) == pytest.approx(product(1005, 1003), abs=1e-3)
        assert abs(product(5, 3) - product(5, 2)) > 1e-2
        assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_the_fast_rotation_is_the_formula_in_output_and_gradient(layout):
    cos, sin = rope_angles(torch.arange(9), rope_frequencies(SMALL.but(width=64))[0])
    x = random(2, 4, 9, 16).requires_grad_()
    slow, fast = rotate(x, cos, sin, layout), turn(x, *wide(cos, sin, layout), layout)
    torch.testing.assert_close(fast, slow)
    mine, other = (torch.autograd.grad(y.pow(3).sum(), x)[0] for y in (fast, slow))
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    half = turn(x.bfloat16(), *wide(cos, sin, layout), layout)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, slow.bfloat16(), atol=0.05, rtol=0.05)


def test_the_two_layouts_are_one_rotation_in_another_order():
    frequencies, _ = rope_frequencies(SMALL.but(width=64))
    cos, sin = rope_angles(torch.arange(9), frequencies)
    x = random(2, 4, 9, 16)
    turned = to_half_layout(rotate(x, cos, sin, "interleaved"))
    torch.testing.assert_close(turned, rotate(to_half_layout(x), cos, sin, "half"))
    paired = torch.view_as_complex(x.reshape(2, 4, 9, 8, 2).contiguous()) * torch.polar(
        torch.ones(9, 8), torch.arange(9)[:, None] * frequencies
    )
    torch.testing.assert_close(rotate(x, cos, sin, "interleaved"), torch.view_as_real(paired).flatten(-2))


def test_ntk_scaling_divides_the_slowest_frequency_and_keeps_the_fastest():
    plain, _ = rope_frequencies(SMALL.but(width=128))
    scaled, _ = rope_frequencies(SMALL.but(width=128, rope_scaling="ntk", rope_factor=4.0))
    assert float(scaled[0]) == pytest.approx(float(plain[0]))
    assert float(scaled[-1]) == pytest.approx(float(plain[-1]) / 4, rel=1e-5)
    assert (scaled[1:] < plain[1:]).all()


def test_sinusoids_and_slopes():
    table = sinusoidal_table(torch.arange(7), 6)
    assert table[3, 0].item() == pytest.approx(math.sin(3))
    assert table[3, 5].item() == pytest.approx(math.cos(3 / 10_000 ** (4 / 6)), abs=1e-6)
    assert sinusoidal_table(torch.arange(3), 5).shape == (3, 5)
    # Press et al.: 12 heads take the eight slopes of 8 heads and four of those of 16
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 2, 8, 12, 7):
        theirs = build_alibi_tensor(torch.ones(1, 5), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(alibi_slopes(heads), theirs)


@pytest.mark.parametrize("positions", ["rope", "sinusoidal"])
def test_shifting_all_positions_changes_nothing_where_only_distance_counts(positions):
    model = Transformer(SMALL.but(positions=positions, init="fan_in")).eval()
    ids = ids_of()
    with torch.no_grad():
        here = model(ids).logits
        there = model(ids, positions=torch.arange(100, 109).expand(2, 9)).logits
    moved = float((here - there).abs().max())
    assert moved > 1e-3 if positions == "sinusoidal" else moved < 1e-4


def test_no_positions_without_a_mask_is_a_bag_of_words():
    model = Transformer(SMALL.but(positions="none", layers=1, init="fan_in")).eval()
    ids = ids_of(1)
    swapped = ids[:, [1, 0, *range(2, 9)]]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, 2:], model(swapped).logits[:, 2:])
        assert (Transformer(SMALL.but(layers=1, init="fan_in"))(ids).logits[:, 2:] != model(ids).logits[:, 2:]).any()


def test_experts_equal_a_loop_over_tokens():
    config = SMALL.but(experts=4, experts_per_token=2, init="fan_in")
    module = Transformer(config).blocks[0].mlp
    x = random(2, 5, 16)
    out, routing = module(x)
    used = torch.zeros(4)
    for b in range(2):
        for t in range(5):
            p = (module.router.weight @ x[b, t]).softmax(0)
            top, expert = p.topk(2)
            expected = sum(
                w * (module.down[e] @ (F.silu(module.gate[e] @ x[b, t]) * (module.up[e] @ x[b, t])))
                for w, e in zip(top / top.sum(), expert.tolist(), strict=True)
            )
            used[expert] += 1
            torch.testing.assert_close(out[b, t], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(routing.load, used / 20)


def test_one_expert_is_the_dense_mlp():
    dense = MLP(SMALL)
    module = MixtureOfExperts(SMALL.but(experts=1, experts_per_token=1))
    with torch.no_grad():
        torch.nn.init.normal_(module.router.weight)
        for name in ("gate", "up", "down"):
            getattr(module, name).copy_(getattr(dense, name).weight[None])
    x = random(2, 5, 16)
    torch.testing.assert_close(module(x)[0], dense(x), atol=1e-6, rtol=1e-5)
    assert float(module(x)[1].balance) == pytest.approx(1.0)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "none"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_block_is_its_formula(placement, norm):
    config = SMALL.but(norm_placement=placement, norm=norm, layers=1, init="fan_in", residual_scale=0.5)
    model = Transformer(config).eval()
    block, ids = model.blocks[0], ids_of()
    seen = model(ids, want=["hidden"])
    x = seen.hidden[0]
    context, _ = model._attention_context(x, None, None, None, None, False)
    for name in ("attention", "mlp"):
        norms = [getattr(block, f"{name}_norm{after}", None) for after in ("", "_after")]
        call = (lambda y: block.attention(y, context)) if name == "attention" else block.mlp
        if placement == "pre":
            x = x + 0.5 * call(norms[0](x))
        elif placement == "post":
            x = norms[0](x + 0.5 * call(x))
        elif placement == "sandwich":
            x = x + 0.5 * norms[1](call(norms[0](x)))
        else:
            x = x + 0.5 * call(x)
    last = model.final_norm(x) if placement in ("pre", "sandwich") else x
    torch.testing.assert_close(seen.hidden[-1], last)
    torch.testing.assert_close(seen.logits, last @ model.embedding.weight.T)


def test_softcap_and_z_loss():
    plain, capped = (Transformer(SMALL.but(logit_softcap=cap, init="fan_in")) for cap in (None, 0.01))
    ids = ids_of()
    torch.testing.assert_close(capped(ids).logits, 0.01 * torch.tanh(plain(ids).logits / 0.01))
    model = Transformer(SMALL.but(z_loss=0.5))
    out = model(ids)
    torch.testing.assert_close(out.aux["penalty"], 0.5 * out.logits.logsumexp(-1).square().mean())
    pads = torch.zeros_like(ids, dtype=torch.bool)
    pads[:, 4:] = True
    torch.testing.assert_close(
        model(ids, pad_mask=pads).aux["penalty"], 0.5 * out.logits[:, :4].logsumexp(-1).square().mean()
    )
    assert model.eval()(ids).aux["penalty"] == 0.0


def test_what_stands_at_padding_never_matters_not_even_nan():
    for config in (SMALL, SMALL.but(positions="alibi"), SMALL.but(experts=4), SMALL.but(positions="learned", window=3)):
        model = Transformer(config.but(init="fan_in"))
        pads = torch.zeros(2, 9, dtype=torch.bool)
        pads[0, :4] = pads[1, 6:] = True
        embeds = model.embedding(ids_of())
        clean = model(embeds=embeds, pad_mask=pads).logits
        dirty = embeds.masked_fill(pads[..., None], torch.nan).detach().requires_grad_()
        out = model(embeds=dirty, pad_mask=pads).logits
        torch.testing.assert_close(out[~pads], clean[~pads])
        out[~pads].square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert dirty.grad[~pads].isfinite().all()
        assert (
            model(torch.zeros(1, 3, dtype=torch.int64), pad_mask=torch.ones(1, 3, dtype=torch.bool))
            .logits.isfinite()
            .all()
        )


def test_initial_weights_follow_the_table_and_depend_on_their_own_name_alone():
    wide = SMALL.but(width=256, heads=4, vocab_size=500)
    for init, std, end in (
        ("gpt2", 0.02, 0.02 / math.sqrt(6)),
        ("fan_in", 1 / 16, 1 / 16 / math.sqrt(6)),
        ("zero_output", 1 / 16, 0),
    ):
        model = Transformer(wide.but(init=init))
        assert float(model.blocks[1].attention.query.weight.std()) == pytest.approx(std, rel=0.05)
        assert float(model.blocks[1].attention.output.weight.std()) == pytest.approx(end, rel=0.05)
        assert float(model.embedding.weight.std()) == pytest.approx(0.02, rel=0.05)
    one, other, again = Transformer(wide), Transformer(wide.but(mlp="gelu", layers=3)), Transformer(wide, seed=1)
    assert torch.equal(one.blocks[2].attention.key.weight, other.blocks[2].attention.key.weight)
    assert not torch.equal(one.blocks[2].attention.key.weight, again.blocks[2].attention.key.weight)
    assert not torch.equal(one.blocks[2].attention.key.weight, one.blocks[1].attention.key.weight)
    loss = F.cross_entropy(one(torch.randint(500, (4, 20))).logits.flatten(0, 1), torch.randint(500, (80,)))
    assert float(loss.detach()) == pytest.approx(math.log(500), abs=0.2)


@pytest.mark.parametrize("name", PRESETS)
def test_cost_is_what_torch_counts_on_every_preset(name):
    config = ModelConfig.preset(name)
    config = config.but(layers=min(config.layers, 2), positions="none" if config.attention == "standard" else "rope")
    length, meta = 96, torch.device("meta")
    if config.experts:  # routing needs numbers: the same ratios, small enough to run
        config, meta = config.but(width=config.width // 16, hidden_width=config.hidden // 16, vocab_size=2000), "cpu"
    with torch.device(meta):
        model = Transformer(config)
        embeds = torch.zeros(1, length, config.width)
        model._angles = lambda places, straight: (torch.zeros(1, length, config.rotary_width),) * 2
        with FlopCounterMode(display=False) as counter:
            model(embeds=embeds, want=["attention"])  # the naive form: the counter is blind to the CPU's fused kernel
    assert model.flops_per_token(length) * length == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen3-0.6b", 596_049_920),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_parameters_are_the_published_numbers(name, parameters):
    with torch.device("meta"):
        assert Transformer(ModelConfig.preset(name)).num_parameters() == parameters


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "batch"}, "norm='batch' is unknown; choose one of rms, layer"),
        ({"heads": 3}, "width 16 is not a multiple of heads 3"),
        ({"key_value_heads": 3}, "heads 4 is not a multiple of key_value_heads 3"),
        ({"head_width": 3}, "3 of them is odd"),
        ({"window": 0}, "window must be at least 1"),
        ({"rope_factor": 2.0}, "does nothing without rope_scaling"),
        ({"attention": "latent"}, "latent attention needs latent_width"),
        ({"experts": 4, "mlp": "gelu"}, "experts are gated"),
        ({"layers": 0}, "layers must be at least 1"),
    ],
)
def test_impossible_configs_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        SMALL.but(**changes)


def test_impossible_inputs_are_refused():
    model, ids = Transformer(SMALL), ids_of()
    for given, said in (
        ({"ids": ids + 30}, "outside a vocabulary of 31"),
        ({"ids": ids[0]}, r"shape \(B, T\)"),
        ({}, "one of the two"),
        ({"ids": ids, "pad_mask": torch.zeros(2, 3, dtype=torch.bool)}, "pad_mask has shape"),
        ({"ids": ids, "want": ["weights"]}, "hidden, attention"),
    ):
        with pytest.raises(ValueError, match=said):
            model(**given)
    with pytest.raises(ValueError, match="there are tiny, small"):
        ModelConfig.preset("gpt5")


def test_dropout_acts_in_training_only():
    model = Transformer(SMALL.but(dropout=0.3, init="fan_in"))
    ids = ids_of()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_a_table_made_while_sampling_serves_training():
    model = Transformer(SMALL)
    with torch.inference_mode():
        model(ids_of())
    model(ids_of()).logits.sum().backward()
    longer = torch.cat([ids_of()] * 4, dim=1)  # 36 tokens, beyond the context of 24
    assert model(longer).logits.shape == (2, 36, 31)
