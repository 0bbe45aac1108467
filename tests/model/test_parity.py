"""Parity with transformers on tiny random configs: logits, loss, every gradient; padding, packing, cache. No download."""

import warnings

import pytest
import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from common.model.attention import AttentionContext
from common.model.cache import Cache
from common.model.config import ModelConfig
from common.model.latent import LatentAttention
from common.model.masks import positions_of
from common.model.mlp import MixtureOfExperts
from common.model.positions import rope_angles, rope_frequencies, wide
from common.pretrained.configs import config_from_hf
from common.pretrained.names import from_transformers, tensors_from_hf
from common.training.loss import language_model_loss

V = 61
LLAMA = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
SCALED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=24, n_layer=3, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    ),
    "llama": lambda: transformers.LlamaConfig(
        **LLAMA, rope_parameters={**SCALED, "original_max_position_embeddings": 32}, attention_bias=True, mlp_bias=True
    ),
    "llama-tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=10),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=4),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4, sliding_window=None),
}  # fmt: skip
by_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family):
    """(theirs, ours) with the same random weights; norms and biases random, too, so that none can be left out."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return theirs, from_transformers(theirs)


def ids_of(rows=3, length=13, seed=0):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(ours, theirs):
    return float(((ours - theirs).norm() / theirs.norm()).detach())


@by_family
def test_logits_loss_and_every_gradient(family):
    theirs, ours = pair(family)
    ids = ids_of()
    mine, other = ours(ids).logits, theirs(ids, labels=ids)
    assert relative(mine, other.logits) < 1e-5
    loss = language_model_loss(mine[:, :-1], ids[:, 1:]).mean
    assert float(loss.detach()) == pytest.approx(float(other.loss.detach()), rel=1e-5)
    loss.backward()
    other.loss.backward()
    expected = tensors_from_hf({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.norm() > 0 or name.endswith("key.bias"), name  # a shift of all scores changes nothing
        assert relative(found[name], gradient) < 1e-5 or gradient.norm() < 1e-6, name


@by_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_with_padding(family, side):
    theirs, ours = pair(family)
    ids, lengths = ids_of(), [13, 5, 9]
    pads = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        pads[row, slice(0, 13 - length) if side == "left" else slice(length, 13)] = True
    positions = positions_of(None, pads)
    with torch.no_grad():
        mine = ours(ids, pad_mask=pads).logits
        other = theirs(ids, attention_mask=(~pads).long(), position_ids=positions).logits
    assert relative(mine[~pads], other[~pads]) < 1e-5


@by_family
def test_with_packed_documents(family):
    theirs, ours = pair(family)
    ids = ids_of(rows=1)
    documents = torch.tensor([[0] * 4 + [1] * 6 + [2] * 3])
    with torch.no_grad():
        mine = ours(ids, document_ids=documents).logits
        alone = [theirs(ids[:, a:b]).logits for a, b in ((0, 4), (4, 10), (10, 13))]
        # restarting positions tell it to separate, where it keeps no cache
        together = theirs(ids, position_ids=positions_of(documents), use_cache=False).logits
    assert relative(mine, torch.cat(alone, dim=1)) < 1e-5
    assert relative(mine, together) < 1e-5


@by_family
def test_with_a_cache(family):
    theirs, ours = pair(family)
    ids = ids_of()
    cache, past = ours.new_cache(3), None
    with torch.inference_mode():
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 13)):
            mine = ours(ids[:, start:end], cache=cache).logits
            other = theirs(ids[:, start:end], past_key_values=past, use_cache=True)
            past = other.past_key_values
            assert relative(mine, other.logits) < 1e-5, (start, end)


@by_family
def test_hidden_states(family):
    theirs, ours = pair(family)
    ids = ids_of()
    with torch.no_grad():
        mine, other = ours(ids, want=["hidden"]).hidden, theirs(ids, output_hidden_states=True).hidden_states
    assert len(mine) == len(other) == 4
    for a, b in zip(mine, other, strict=True):
        assert relative(a, b) < 1e-5


@by_family
def test_attention_weights(family):
    theirs, ours = pair(family)
    ids = ids_of()
    with torch.no_grad():
        mine, other = ours(ids, want=["attention"]).aux["attention"], theirs(ids, output_attentions=True).attentions
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scaling", ["default", "linear", "yarn", "llama3"])
def test_rope_frequencies_of_every_scaling(scaling):
    rope = {"rope_type": scaling, "rope_theta": 10_000.0}
    if scaling != "default":
        rope |= {"factor": 8.0, "original_max_position_embeddings": 256}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = transformers.LlamaConfig(
        **{**LLAMA, "hidden_size": 256, "max_position_embeddings": 2048}, rope_parameters=rope
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    frequencies, factor = rope_frequencies(config_from_hf(theirs.to_dict()))
    torch.testing.assert_close(frequencies, rotary.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(rotary.attention_scaling)
    positions = torch.arange(0, 2048, 7)[None]
    cos, sin = rope_angles(positions, frequencies, factor)
    for ours, other in zip((cos, sin), rotary(torch.zeros(1), positions), strict=True):
        torch.testing.assert_close(ours, other[..., :32], atol=1e-3, rtol=0)  # angles up to 2,048 in fp32


@pytest.mark.parametrize("query_latent", [None, 10])
@pytest.mark.parametrize("interleaved", [True, False])
def test_latent_attention_in_both_forms(query_latent, interleaved):
    torch.manual_seed(0)
    theirs_config = transformers.DeepseekV3Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=query_latent, kv_lora_rank=7,
        qk_rope_head_dim=6, qk_nope_head_dim=5, v_head_dim=3, rope_interleave=interleaved, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    theirs_config._attn_implementation = "eager"
    theirs = DeepseekV3Attention(theirs_config, 0).eval()
    config = ModelConfig(
        vocab_size=9, width=24, heads=4, head_width=5, attention="latent", latent_width=7, query_latent_width=query_latent,
        rope_head_width=6, value_head_width=3, rope_layout="interleaved" if interleaved else "half", layers=1,
    )  # fmt: skip
    ours = LatentAttention(config).eval()
    names = {"q_a_proj": "query_down", "q_a_layernorm": "query_norm", "kv_a_proj_with_mqa": "down", "o_proj": "output"}
    names |= {"kv_a_layernorm": "latent_norm", "kv_b_proj": "up", "q_b_proj": "query", "q_proj": "query"}
    with torch.no_grad():
        for name in ("kv_a_layernorm", "q_a_layernorm"):
            if getattr(theirs, name) is not None:
                getattr(theirs, name).weight.add_(0.3 * torch.randn_like(getattr(theirs, name).weight))
    ours.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 9, 24, requires_grad=True)
    rotary = DeepseekV3RotaryEmbedding(theirs_config)
    places = torch.arange(9)[None]
    mask = torch.zeros(9, 9).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)[None, None]
    other = theirs(x, rotary(x, places), mask)[0]
    frequencies, _ = rope_frequencies(config)
    rotation = tuple(part[:, None] for part in wide(*rope_angles(places, frequencies), config.rope_layout))
    expected = torch.autograd.grad(other.square().sum(), [x, *theirs.parameters()])
    for absorbed in (False, True):
        mine = ours(x, AttentionContext(rotation=rotation), absorbed=absorbed)
        assert relative(mine, other) < 1e-5
        found = torch.autograd.grad(mine.square().sum(), [x, *ours.parameters()])
        assert len(found) == len(expected)
        assert relative(found[0], expected[0]) < 1e-5
        by_shape = lambda tensors: sorted((tuple(t.shape), float(t.norm())) for t in tensors)  # noqa: E731
        for (shape, a), (_, b) in zip(by_shape(found), by_shape(expected), strict=True):
            assert a == pytest.approx(b, rel=1e-4), shape
    cache = Cache(config, 2, 9)  # seven tokens expanded, then two absorbed
    with torch.inference_mode():
        first = AttentionContext(rotation=tuple(part[:, :, :7] for part in rotation), cache=cache)
        second = AttentionContext(rotation=tuple(part[:, :, 7:] for part in rotation), cache=cache)
        cache.begin((2, 7), None, None)
        start = ours(x[:, :7], first)
        cache.advance(7)
        cache.begin((2, 2), None, None)
        end = ours(x[:, 7:], second)
    assert relative(torch.cat([start, end], dim=1), other) < 1e-5


def test_balance_loss_is_the_one_of_transformers_and_counts_real_tokens():
    torch.manual_seed(0)
    module = MixtureOfExperts(ModelConfig(vocab_size=9, width=8, heads=2, experts=4, experts_per_token=2))
    torch.nn.init.normal_(module.router.weight)
    for parameter in (module.gate, module.up, module.down):
        torch.nn.init.normal_(parameter)
    x, pads = torch.randn(2, 7, 8), torch.zeros(2, 7, dtype=torch.bool)
    pads[1, 3:] = True
    for mask in (None, pads):
        _, routing = module(x, mask)
        attention = None if mask is None else (~mask).long()
        theirs = load_balancing_loss_func((module.router(x.flatten(0, 1)),), 4, 2, attention)
        assert float(routing.balance) == pytest.approx(
            float(theirs) / 2, rel=1e-5
        )  # they count each of the two choices
        assert float(routing.load.sum()) == pytest.approx(1.0)


def test_tensors_that_do_not_fit_are_all_named():
    theirs, ours = pair("llama")
    state = dict(theirs.state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.9.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"up_proj.weight.*left over.*layers\.9\.extra"):
        tensors_from_hf(state, ours.config)
    state = dict(theirs.state_dict())
    state["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"model\.norm\.weight gives final_norm\.weight the shape \(3,\)"):
        tensors_from_hf(state, ours.config)


def test_configs_that_our_model_cannot_be_are_refused_by_field():
    llama = transformers.LlamaConfig(**LLAMA).to_dict()
    for field, value in (("model_type", "bert"), ("hidden_act", "gelu")):
        with pytest.raises(ValueError, match=field):
            config_from_hf({**llama, field: value})
    gpt2 = FAMILIES["gpt2"]().to_dict()
    for field, value in (("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("n_inner", 7)):
        with pytest.raises(ValueError, match=field):
            config_from_hf({**gpt2, field: value})
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    for key in ("attention_factor", "mscale", "truncate"):
        with pytest.raises(ValueError, match=key):
            config_from_hf({**llama, "rope_parameters": {**yarn, key: 0.5}})
    with pytest.raises(ValueError, match="use_sliding_window"):
        config_from_hf({**llama, "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8})
    old = {key: value for key, value in llama.items() if key != "rope_parameters"}
    assert config_from_hf(old).rope_base == 10_000.0
    assert (
        config_from_hf({**llama, "model_type": "mistral"}).window == 4096
    )  # what transformers takes where it is missing
    with pytest.raises(ValueError, match="rope_type 'longrope'"):
        config_from_hf({**llama, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}})
