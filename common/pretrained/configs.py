"""Configs of other people as ours, and ours as theirs: dicts, as in any `config.json`. transformers is not imported."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.model.config import ModelConfig

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
THEIRS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
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
        attention_bias=theirs.get("attention_bias", False) and kind in ("llama", "qwen3"),  # the others never have any
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
        mlp_bias=theirs.get("mlp_bias", False) and kind == "llama",
        experts=theirs.get("num_local_experts", 0) if kind == "mixtral" else 0,
        experts_per_token=theirs.get("num_experts_per_tok", 2) if kind == "mixtral" else 2,
        tied=theirs.get("tie_word_embeddings", False),
    )


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


GGUF_FAMILIES = ("llama", "qwen3")
GGUF_SCALINGS = {"none": "none", "linear": "linear"}


def config_from_gguf(metadata: Mapping[str, Any], *, vocab_size: int, tied: bool) -> ModelConfig:
    """Our config of the metadata of a GGUF file; llama.cpp's names. Raises ValueError for what our model cannot do.

    Args:
        vocab_size: rows of the embedding.
        tied: the file has no output matrix.
    """
    kind = metadata.get("general.architecture")
    if kind not in GGUF_FAMILIES:
        raise ValueError(f"general.architecture {kind!r} is unknown; there are {', '.join(GGUF_FAMILIES)}")

    def field(name: str, *default: Any) -> Any:
        key = f"{kind}.{name}"
        if key not in metadata and not default:
            raise ValueError(f"it has no {key}")
        return metadata.get(key, *default)

    width, heads, scaling = field("embedding_length"), field("attention.head_count"), field("rope.scaling.type", "none")
    if scaling not in GGUF_SCALINGS:
        raise ValueError(f"{kind}.rope.scaling.type {scaling!r} is unknown; there are {', '.join(GGUF_SCALINGS)}")
    head_width = field("attention.key_length", width // heads)
    if field("rope.dimension_count", head_width) != head_width:
        raise ValueError(f"{kind}.rope.dimension_count: only whole heads can be turned")
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=field("context_length"),
        layers=field("block_count"),
        width=width,
        heads=heads,
        key_value_heads=field("attention.head_count_kv", heads),
        head_width=head_width,
        qk_norm=kind == "qwen3",
        rope_base=field("rope.freq_base", 10_000.0),
        rope_scaling=GGUF_SCALINGS[scaling],
        rope_factor=field("rope.scaling.factor", 1.0) if scaling != "none" else 1.0,
        norm_epsilon=field("attention.layer_norm_rms_epsilon"),
        hidden_width=field("feed_forward_length"),
        tied=tied,
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model of ours, in the family that has this shape.

    What is written is read back and compared, so that a field which no family has cannot be lost silently.

    Raises:
        ValueError: no family of theirs has this shape; names the fields.
    """
    made = _gpt2_config(config) if config.positions == "learned" else _llama_config(config)
    try:
        back = _shape_of(config_from_hf(made))
    except ValueError as error:
        raise ValueError(f"this model has no Hugging Face form: {error}") from None
    lost = [f"{name}={value!r}" for name, value in _shape_of(config).items() if back.get(name) != value]
    if lost:
        raise ValueError(
            f"this model has no Hugging Face form: the {made['model_type']} family has no {', '.join(lost)}"
        )
    return made


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.hidden,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": THEIRS.get(config.mlp, config.mlp),
        "tie_word_embeddings": config.tied,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip


def _llama_config(config: ModelConfig) -> dict[str, Any]:
    kind = "mixtral" if config.experts else "qwen3" if config.qk_norm else "mistral" if config.window else "llama"
    scaling = {theirs: key for key, theirs in SCALINGS.items() if key != "default"}
    rope: dict[str, Any] = {
        "rope_type": scaling.get(config.rope_scaling, config.rope_scaling),
        "rope_theta": config.rope_base,
    }
    if config.rope_scaling == "none":
        rope["rope_type"] = "default"
    else:
        original = config.rope_original_context or config.context_length
        rope |= {"factor": config.rope_factor, "original_max_position_embeddings": original}
    if config.rope_scaling == "llama3":
        rope |= {"low_freq_factor": config.rope_low_frequency, "high_freq_factor": config.rope_high_frequency}
    if config.rope_scaling == "yarn":
        rope |= {"beta_fast": config.yarn_fast, "beta_slow": config.yarn_slow}
    made = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.d_head,
        "attention_bias": config.attention_bias,
        "rope_parameters": rope,
        "rope_theta": config.rope_base,  # where readers of before 2026 look
        "rms_norm_eps": config.norm_epsilon,
        "intermediate_size": config.hidden,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
    }
    if kind in ("mistral", "mixtral"):
        made["sliding_window"] = config.window
    if config.experts:
        made |= {"num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token}
    return made


# What does not decide the function, or is not lost: rows of Q and K are reordered when weights are written.
WITHOUT_LOSS = ("balance_loss", "z_loss", "init", "init_std", "dropout", "rope_layout")


def _shape_of(config: ModelConfig) -> dict[str, Any]:
    """What decides the function that a model computes, every default written out."""
    out = config.attention_bias if config.output_bias is None else config.output_bias
    made = dataclasses.asdict(config) | {"key_value_heads": config.groups, "head_width": config.d_head,
                                         "hidden_width": config.hidden, "output_bias": out}  # fmt: skip
    unused = [*WITHOUT_LOSS]
    if config.positions != "rope":
        unused += [name for name in made if name.startswith(("rope_", "yarn_"))]
    if config.rope_scaling == "none":
        unused += ["rope_original_context"]
    elif config.rope_original_context is None:
        made["rope_original_context"] = config.context_length
    if config.rope_scaling != "llama3":
        unused += ["rope_low_frequency", "rope_high_frequency"]
    if config.rope_scaling != "yarn":
        unused += ["yarn_fast", "yarn_slow"]
    if not config.experts:
        unused += ["experts_per_token"]
    return {name: value for name, value in made.items() if name not in unused}
