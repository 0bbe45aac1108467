"""Tiny pairs of models, transformers' and ours, and the bugs that are put into ours."""

import warnings
from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from common.model import attention, transformer
from common.model.mlp import MixtureOfExperts
from common.model.norms import Norm
from common.model.positions import rope_angles, rope_frequencies, wide
from common.model.transformer import Transformer
from common.pretrained.names import from_transformers, rows_to_half
from common.pretrained.parity import parity_report

V, T = 53, 40
SHAPE = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.25,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.25,
    ),
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "biases": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "tied": lambda: transformers.LlamaConfig(**{**SHAPE, "tie_word_embeddings": True}),
    "yarn": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=YARN),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=10),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=7),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None),
}  # fmt: skip
MADE = {}


def pair(family):
    """(theirs, ours) with the same random weights; norms and biases random, too; small embeddings, as in real models."""
    if family not in MADE:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                if "embed_tokens" in name or "wte" in name:
                    parameter.mul_(0.2)
        MADE[family] = theirs
    return MADE[family], from_transformers(MADE[family])


def ids_of(rows=2, length=T):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


def report(family, bug=None, **more):
    """The report of a model with a bug. A bug changes the model, or returns another one, or something to be inside of."""
    theirs, ours = pair(family)
    with torch.no_grad():
        made = bug(ours) if bug else None
    ours = made if isinstance(made, Transformer) else ours
    with made if hasattr(made, "__enter__") else nullcontext():
        return parity_report(ours, theirs, ids_of(), **more)


# --- bugs -------------------------------------------------------------------------------------------------------------


def config(**changes):
    """The same weights under another config."""

    def bug(model):
        made = Transformer(model.config.but(**changes)).eval()
        made.load_state_dict(model.state_dict())
        return made

    return bug


def weight(path, change, layer=1):
    """Another tensor in one place."""

    def bug(model):
        inside = path.startswith(("attention", "mlp"))
        parameter = model.get_parameter(f"blocks.{layer}.{path}" if inside else path)
        parameter.copy_(change(parameter))

    return bug


def exchange(first, second, layer=1):
    def bug(model):
        a, b = (model.get_parameter(f"blocks.{layer}.{path}.weight") for path in (first, second))
        old = a.clone()
        a.copy_(b)
        b.copy_(old)

    return bug


def interleaved(heads):
    """From the half layout: what llama.cpp's converter does."""
    return lambda w: w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def random_like(w):
    return w.std() * torch.randn(w.shape, generator=torch.Generator().manual_seed(5))


def head_at_random(model):
    made = config(tied=False)(model)
    made.head.weight.copy_(random_like(made.head.weight))
    return made


def layer_at_random(model):
    fresh = Transformer(model.config, seed=3)
    model.blocks[1].load_state_dict(fresh.blocks[1].state_dict())


def every_epsilon(value):
    def bug(model):
        for module in model.modules():
            if isinstance(module, Norm):
                module.epsilon = value

    return bug


def activation(function):
    def bug(model):
        model.blocks[1].mlp.activation = function

    return bug


def angles_in(form):
    def angles(positions, frequencies, factor=1.0):
        made = positions[..., None].to(form) * frequencies.to(form)
        return made.cos().float() * factor, made.sin().float() * factor

    return lambda model: patch.object(transformer, "rope_angles", angles)


def attending(change):
    """Attention with another rule, in every layer."""
    plain = attention.attend_naive

    def attend(q, k, v, *, mask=None, bias=None, scale=None, dropout=0.0):
        return plain(**change(q=q, k=k, v=v, mask=mask, bias=bias, scale=scale))[0]

    return lambda model: patch.object(attention, "attend", attend)


def turned(model):
    """Its attention context, with angles."""
    plain = model._attention_context

    def context(x, *more):
        made, places = plain(x, *more)
        frequencies, _ = rope_frequencies(model.config.but(positions="rope"))
        made.rotation = tuple(part[:, None] for part in wide(*rope_angles(places, frequencies), "half"))
        return made, places

    return context


def tiled(k, v, q, **more):
    repeats = q.shape[1] // k.shape[1]
    return {**more, "q": q, "k": k.repeat(1, repeats, 1, 1), "v": v.repeat(1, repeats, 1, 1)}


def scaled(q, **more):
    return {**more, "q": q, "scale": 1 / q.shape[-1]}


def unmasked(q, k, **more):
    return {**more, "q": q, "k": k, "mask": torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)}


def norms_differently(change):
    def bug(model):
        plain = Norm.forward
        return patch.object(Norm, "forward", lambda self, x: change(self, x, plain))

    return bug


def rounded(model):
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def rounded_matrices(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(module.weight.bfloat16())


def first_rows(count, change):
    def made(w):
        w = w.clone()
        w[:count] = change(w[:count])
        return w

    return made


def experts_exchanged(model):
    mlp = model.blocks[1].mlp
    old = mlp.gate.clone()
    mlp.gate.copy_(mlp.up)
    mlp.up.copy_(old)


def experts_unscaled(model):
    plain = MixtureOfExperts.forward

    def forward(self, x, pad_mask=None):
        out, routing = plain(self, x, pad_mask)
        share = self.router(x).softmax(dim=-1).topk(self.chosen, dim=-1).values.sum(dim=-1, keepdim=True)
        return out * share, routing

    return patch.object(MixtureOfExperts, "forward", forward)


def row_of_token(token):
    def change(w):
        w = w.clone()
        w[token] = w[token].flip(0)
        return w

    return change


def exchange_layers(model, path):
    a, b = (block.get_parameter(path) for block in model.blocks)
    old = a.clone()
    a.copy_(b)
    b.copy_(old)


def with_bias(model):
    model.blocks[1].mlp.up.bias = nn.Parameter(torch.linspace(-1, 1, 40))


TOKEN = int(ids_of()[0, 3])
BUGS = {  # name: (family, bug, first stage, words of the cause)
    "square matrix transposed": ("llama", weight("attention.output.weight", lambda w: w.T.clone()),
        "layer 1, attention", "transposed"),
    "query transposed": ("llama", weight("attention.query.weight", lambda w: w.T.clone()),
        "layer 1, query", "transposed"),
    "gpt2 transposed": ("gpt2", weight("attention.key.weight", lambda w: w.T.clone()), "layer 1, key", "transposed"),
    "rows of Q interleaved": ("llama", weight("attention.query.weight", interleaved(4)),
        "layer 1, query", "interleaved rotary"),
    "rows of K interleaved": ("llama", weight("attention.key.weight", interleaved(2)),
        "layer 1, key", "interleaved rotary"),
    "rows of Q once too often": (
        "llama", weight("attention.query.weight", lambda w: rows_to_half(w, 4)), "layer 1, query", "once too often"),
    "rows of K once too often": (
        "qwen3", weight("attention.key.weight", lambda w: rows_to_half(w, 2)), "layer 1, key", "once too often"),
    "rows and biases of Q": ("biases", lambda m: [
        weight(f"attention.query.{p}", interleaved(4))(m) for p in ("weight", "bias")],
        "layer 1, query", "interleaved rotary"),
    "epsilon of the config": ("llama", config(norm_epsilon=1e-6),
        "layer 0, attention norm", "the reference adds epsilon 1e-05, ours 1e-06"),
    "epsilon of the module": ("llama", every_epsilon(1e-6),
        "layer 0, attention norm", "plainly: ours adds epsilon 1e-06"),
    "epsilon of LayerNorm": ("gpt2", config(norm_epsilon=1e-3), "layer 0, attention norm", "adds epsilon 1e-05"),
    "base": ("llama", config(rope_base=500_000.0),
        "layer 0, heads", "base 10,000 of its rotary positions, ours 500,000"),
    "layout": ("llama", config(rope_layout="interleaved"), "layer 0, heads", "half layout, ours the interleaved one"),
    "no rotary positions": ("llama", config(positions="none"),
        "layer 0, heads", "the reference has rotary positions of base 10,000"),
    "rotary positions that are not there": ("gpt2", lambda m: patch.object(m, "_attention_context", turned(m)),
        "layer 0, heads", "ours has rotary positions of base 10,000"),
    "scaling of positions": ("llama", config(rope_scaling="linear", rope_factor=4.0),
        "layer 0, heads", "does not scale its rotary"),
    "scaling left out": ("yarn", config(rope_scaling="none", rope_factor=1.0),
        "layer 0, heads", "another rule of attention"),
    "scale of the config": ("llama", config(attention_scale=1 / 6),
        "layer 0, heads", "scales scores by 1 / sqrt(D) = 0.4082, ours 0.1667"),
    "scale of the code": ("llama", attending(scaled), "layer 0, heads", "plainly: ours scales scores by 1 / D"),
    "tiled heads": ("llama", attending(tiled), "layer 0, heads", "ours gives key-value heads to query heads in turn"),
    "not causal": ("gpt2", attending(unmasked), "layer 0, heads", "ours is not causal"),
    "angles in bfloat16": ("llama", angles_in(torch.bfloat16),
        "layer 0, heads", "ours computes its rotary angles in torch.bfloat16"),
    "angles in float16": ("qwen3", angles_in(torch.float16),
        "layer 0, heads", "ours computes its rotary angles in torch.float16"),
    "window left out": ("mistral", config(window=None), "layer 0, heads", "sees a window of 7, ours no window"),
    "window of another size": ("mistral", config(window=8), "layer 0, heads", "sees a window of 7, ours 8"),
    "window where there is none": ("llama", config(window=9), "layer 0, heads", "sees everything before"),
    "key and value exchanged": ("llama", exchange("attention.key", "attention.value"),
        "layer 1, key", "our key is the reference's value"),
    "gate and up exchanged": ("llama", exchange("mlp.gate", "mlp.up"),
        "layer 1, gate", "our gate is the reference's up"),
    "another layer's matrix": ("llama", lambda m: m.blocks[1].mlp.down.weight.copy_(
        m.blocks[0].mlp.down.weight), "layer 1, MLP", "other weights"),
    "layers in another order": ("llama", lambda m: setattr(m, "blocks", nn.ModuleList(reversed(m.blocks))),
                                "layer 0, attention norm", "other weights"),
    "query of the layer before": ("llama", lambda m: exchange_layers(m, "attention.query.weight"),
                                  "layer 0, query", "that of our layer 1"),
    "bias missing": ("biases", weight("attention.value.bias", torch.zeros_like), "layer 1, value", "a bias"),
    "bias missing in the MLP": ("biases", weight("mlp.down.bias", torch.zeros_like), "layer 1, MLP", "a bias"),
    "bias of a norm": ("gpt2", weight("final_norm.bias", torch.zeros_like), "final norm", "a bias"),
    "bias added": ("llama", with_bias, "layer 1, up", "has no bias here"),
    "head at random": ("tied", head_at_random, "logits", "is its embedding"),
    "GELU erf for tanh": ("gpt2", config(mlp="gelu"), "layer 0, activation", "applies gelu_tanh, ours gelu"),
    "ReLU for GELU": ("gpt2", activation(F.relu), "layer 1, activation", "plainly: ours applies relu"),
    "GELU for SiLU": ("llama", activation(F.gelu), "layer 1, activation", "ours applies gelu"),
    "gate on the wrong side": ("llama", lambda m: patch.object(
        type(m.blocks[0].mlp), "forward", lambda s, x: s.down(s.gate(x) * F.silu(s.up(x)))), "layer 0, activation",
        "ours exchanges gate and up"),
    "layer at random": ("llama", layer_at_random, "layer 1, attention norm", "never loaded"),
    "matrix at random": ("llama", weight("mlp.up.weight", random_like), "layer 1, up", "other weights"),
    "1 added to a norm": ("llama", weight("mlp_norm.weight", lambda w: w + 1), "layer 1, MLP norm", "has 1 added"),
    "1 + weight left out": ("llama", weight("mlp_norm.weight", lambda w: w - 1), "layer 1, MLP norm", "1 + weight"),
    "norm of a head": ("qwen3", weight("attention.query_norm.weight", lambda w: w.flip(0)),
        "layer 1, query norm", "other weights"),
    "LayerNorm for RMSNorm": ("llama", norms_differently(
        lambda self, x, plain: F.layer_norm(x, self.weight.shape, self.weight, None, self.epsilon)),
        "layer 0, attention norm", "ours subtracts the mean"),
    "RMSNorm for LayerNorm": ("gpt2", norms_differently(
        lambda self, x, plain: F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)),
        "layer 0, attention norm", "ours does not subtract the mean"),
    "norm of the square of the largest": ("llama", norms_differently(
        lambda self, x, plain: plain(self, x) / x.abs().amax(dim=-1, keepdim=True)),
        "layer 0, attention norm", "the computation is at fault"),
    "everything rounded": ("llama", rounded,
        "embedding", "our weights are those of the reference, rounded to torch.bfloat16"),
    "matrices rounded": ("llama", rounded_matrices, "layer 0, query", "our weights are rounded to torch.bfloat16"),
    "row of the embedding": ("llama", weight("embedding.weight", row_of_token(TOKEN)),
        "embedding", f"the first is {TOKEN}: rows of the table"),
    "row of the positions": ("gpt2", weight("position_table.weight", row_of_token(9)),
        "positions", "1 of the 40 rows that are used differ, the first is 9"),
    "embedding scaled": ("llama", weight("embedding.weight", lambda w: w / 24**0.5),
        "embedding", "multiplies embeddings by 4.899"),
    "embedding scaled in the code": ("llama", config(embedding_scale=24**0.5),
        "start of the stream", "ours is 4.899 embedding, the reference 1 embedding"),
    "residual scaled": ("llama", config(residual_scale=0.5),
        "layer 0, middle", "ours is 1 stream before + 0.5 attention, the reference 1 stream before + 1"),
    "no residual": ("llama", config(residual=False),
        "layer 0, middle", "ours is 0 stream before + 1 attention, the reference 1 stream before + 1"),
    "rows of a matrix": ("llama", weight("mlp.gate.weight", first_rows(3, lambda w: w.flip(1))),
        "layer 1, gate", "3 of 40 channels differ, the first is 0"),
    "halves exchanged": ("llama", weight("mlp.up.weight", lambda w: w.roll(20, 0)),
        "layer 1, up", "halves of our matrix"),
    "matrix doubled": ("llama", weight("mlp.up.weight", lambda w: 2 * w),
        "layer 1, up", "ours is 2 times theirs: a scale"),
    "cap on logits": ("llama", config(logit_softcap=20.0), "output", "logit_softcap=20"),
    "head of another model": ("llama", weight("head.weight", random_like), "logits", "other weights"),
    "experts: gate and up": ("mixtral", experts_exchanged, "layer 1, MLP", "exchanges gate and up in its experts"),
    "experts: how many": ("mixtral", config(experts_per_token=3),
        "layer 0, MLP", "chooses 2 experts for a token, ours 3"),
    "experts: not to one": ("mixtral", experts_unscaled, "layer 0, MLP", "ours does not scale the probabilities"),
    "experts: one at random": ("mixtral", weight("mlp.down", first_rows(1, random_like)),
        "layer 1, MLP", "other weights"),
    "not a number": ("llama", weight("mlp.up.weight", lambda w: w / 0),
        "layer 1, up", "ours holds infinities or NaN"),
}  # fmt: skip
