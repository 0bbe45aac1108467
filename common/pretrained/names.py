"""Hugging Face configs and tensors as ours: a table of names for each family, and nothing clever.

`transformers` is not imported here: a config is a dict, as in any `config.json`, and weights are named tensors. The same
renaming is linear, so it maps gradients as well as weights. Reading files comes in June.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.model.config import ModelConfig
from common.model.transformer import Transformer

LLAMA = {  # ours -> theirs; {i} is the layer
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.attention.query.{p}": "model.layers.{i}.self_attn.q_proj.{p}",
    "blocks.{i}.attention.key.{p}": "model.layers.{i}.self_attn.k_proj.{p}",
    "blocks.{i}.attention.value.{p}": "model.layers.{i}.self_attn.v_proj.{p}",
    "blocks.{i}.attention.output.{p}": "model.layers.{i}.self_attn.o_proj.{p}",
    "blocks.{i}.attention.query_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks.{i}.attention.key_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight",
    "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.experts.gate_up_proj",  # first half of dimension 1
    "blocks.{i}.mlp.up": "model.layers.{i}.mlp.experts.gate_up_proj",  # second half
    "blocks.{i}.mlp.down": "model.layers.{i}.mlp.experts.down_proj",
    "blocks.{i}.mlp.gate.{p}": "model.layers.{i}.mlp.gate_proj.{p}",
    "blocks.{i}.mlp.up.{p}": "model.layers.{i}.mlp.up_proj.{p}",
    "blocks.{i}.mlp.down.{p}": "model.layers.{i}.mlp.down_proj.{p}",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
GPT2 = {
    "embedding.weight": "transformer.wte.weight",
    "position_table.weight": "transformer.wpe.weight",
    "blocks.{i}.attention_norm.{p}": "transformer.h.{i}.ln_1.{p}",
    "blocks.{i}.attention.query.{p}": "transformer.h.{i}.attn.c_attn.{p}",  # first third of the last dimension
    "blocks.{i}.attention.key.{p}": "transformer.h.{i}.attn.c_attn.{p}",  # second
    "blocks.{i}.attention.value.{p}": "transformer.h.{i}.attn.c_attn.{p}",  # third
    "blocks.{i}.attention.output.{p}": "transformer.h.{i}.attn.c_proj.{p}",
    "blocks.{i}.mlp_norm.{p}": "transformer.h.{i}.ln_2.{p}",
    "blocks.{i}.mlp.up.{p}": "transformer.h.{i}.mlp.c_fc.{p}",
    "blocks.{i}.mlp.down.{p}": "transformer.h.{i}.mlp.c_proj.{p}",
    "final_norm.{p}": "transformer.ln_f.{p}",
    "head.weight": "lm_head.weight",
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
USUAL = {  # what changes the function and has no field in ours; ours has no dropout on weights
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
}
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow", "partial_rotary_factor",
}  # fmt: skip
SCALINGS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}


def config_from_hf(theirs: Mapping[str, Any]) -> ModelConfig:
    """Our config of a Hugging Face `config.json`. Raises ValueError for what our model cannot do, naming the field."""
    kind = theirs.get("model_type")
    for name, usual in USUAL.items():
        if theirs.get(name, usual) != usual:
            raise ValueError(f"{name}={theirs[name]!r}: only {usual!r} is supported")
    if kind == "gpt2":
        if theirs.get("n_inner") not in (None, 4 * theirs["n_embd"]):
            raise ValueError(f"n_inner={theirs['n_inner']}: only the usual 4 * n_embd is supported")
        return ModelConfig(
            vocab_size=theirs["vocab_size"],
            context_length=theirs["n_positions"],
            layers=theirs["n_layer"],
            width=theirs["n_embd"],
            heads=theirs["n_head"],
            attention_bias=True,
            positions="learned",
            norm="layer",
            norm_epsilon=theirs["layer_norm_epsilon"],
            mlp=_activation(theirs["activation_function"]),
            mlp_bias=True,
            tied=theirs.get("tie_word_embeddings", True),
        )
    if kind not in ("llama", "qwen3", "mistral", "mixtral"):
        raise ValueError(f"model_type {kind!r} is unknown; there are gpt2, llama, qwen3, mistral, mixtral")
    if theirs.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={theirs['hidden_act']!r}: these families use silu")
    window = theirs.get(
        "sliding_window", 4096 if kind == "mistral" else None
    )  # what transformers takes where it is missing
    if kind == "qwen3" and (
        theirs.get("use_sliding_window") or "sliding_attention" in (theirs.get("layer_types") or [])
    ):
        raise ValueError("use_sliding_window: Qwen3 with windows in some layers is not supported")
    rope = theirs.get("rope_parameters") or {
        **(theirs.get("rope_scaling") or {}), "rope_theta": theirs.get("rope_theta", 10_000.0)
    }  # fmt: skip
    strange = {key for key, value in rope.items() if key not in ROPE_KEYS and value is not None}
    if strange or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope parameters {sorted(strange or ['partial_rotary_factor'])} are not supported")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in SCALINGS:
        raise ValueError(f"rope_type {scaling!r} is unknown; there are {', '.join(SCALINGS)}")
    return ModelConfig(
        vocab_size=theirs["vocab_size"],
        context_length=theirs["max_position_embeddings"],
        layers=theirs["num_hidden_layers"],
        width=theirs["hidden_size"],
        heads=theirs["num_attention_heads"],
        key_value_heads=theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
        head_width=theirs.get("head_dim"),
        attention_bias=theirs.get("attention_bias", False),
        qk_norm=kind == "qwen3",
        window=window if kind in ("mistral", "mixtral") else None,
        rope_base=rope["rope_theta"],
        rope_scaling=SCALINGS[scaling],
        rope_factor=rope.get("factor", 1.0),
        rope_original_context=rope.get("original_max_position_embeddings"),
        rope_low_frequency=rope.get("low_freq_factor", 1.0),
        rope_high_frequency=rope.get("high_freq_factor", 4.0),
        yarn_fast=rope.get("beta_fast", 32.0),
        yarn_slow=rope.get("beta_slow", 1.0),
        norm_epsilon=theirs["rms_norm_eps"],
        hidden_width=theirs["intermediate_size"],
        mlp_bias=theirs.get("mlp_bias", False),
        experts=theirs.get("num_local_experts", 0) if kind == "mixtral" else 0,
        experts_per_token=theirs.get("num_experts_per_tok", 2) if kind == "mixtral" else 2,
        tied=theirs.get("tie_word_embeddings", False),
    )


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def tensors_from_hf(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors (weights or gradients) under our names and in our shapes.

    Raises ValueError that names every tensor which is missing or left over.
    """
    with torch.device("meta"):
        wanted = Transformer(config).state_dict()
    gpt2 = config.positions == "learned"
    table = GPT2 if gpt2 else LLAMA
    found, used, missing = {}, set(), []
    for name in wanted:
        if name == "head.weight" and config.tied:
            continue
        source = _their_name(name, table)
        if source not in theirs:
            missing.append(f"{source} (our {name})")
            continue
        used.add(source)
        found[name] = _our_shape(name, theirs[source], gpt2)
        if found[name].shape != wanted[name].shape:
            raise ValueError(
                f"{source} gives {name} the shape {tuple(found[name].shape)}, the config says {tuple(wanted[name].shape)}"
            )
    left = sorted(set(theirs) - used - ({"lm_head.weight"} if config.tied else set()))
    if missing or left:
        raise ValueError(f"tensors do not fit the config: missing {missing or 'none'}, left over {left or 'none'}")
    return found


def _their_name(ours: str, table: Mapping[str, str]) -> str:
    layer = re.search(r"\.(\d+)\.", ours)
    pattern = ours if layer is None else ours.replace(f".{layer[1]}.", ".{i}.", 1)
    stem, _, last = pattern.rpartition(".")
    theirs = table.get(pattern) or table.get(f"{stem}.{{p}}")
    if theirs is None:
        raise ValueError(f"no name for {ours} in this family: it has no such part")
    return theirs.replace("{i}", layer[1] if layer else "").replace("{p}", last)


def _our_shape(name: str, tensor: Tensor, gpt2: bool) -> Tensor:
    part, _, kind = name.rpartition(".")
    if (gpt2 and ".attention." in name) or (gpt2 and ".mlp." in name):
        for place, piece in enumerate(("query", "key", "value")):
            if part.endswith(piece):
                tensor = tensor.chunk(3, dim=-1)[place]
        return tensor.T if kind == "weight" else tensor  # their Conv1D keeps (inputs, outputs)
    if name.endswith(("mlp.gate", "mlp.up")):  # experts, stacked
        return tensor.chunk(2, dim=1)[0 if name.endswith("gate") else 1]
    return tensor


def from_transformers(module: torch.nn.Module) -> Transformer:
    """A copy of a transformers model (GPT-2, Llama, Qwen3, Mistral, Mixtral) as ours: same format, device and mode.

    Its dropout is zero whatever their config says.
    """
    config = config_from_hf(module.config.to_dict())
    made = Transformer(config).to(module.dtype)
    found = tensors_from_hf(module.state_dict(), config)
    if config.tied:
        found["head.weight"] = found["embedding.weight"]
    made.load_state_dict(found)
    return made.to(next(module.parameters()).device).train(module.training)
