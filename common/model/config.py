"""Every architecture choice of the year as one flat record, and the published models as values of it.

A model is a point in this space, not a class: GPT-2, Llama, Qwen3, Mistral, Mixtral and latent attention differ in the
fields below and in nothing else. Left out on purpose: encoders, cross-attention, mixtures of attention kinds by layer.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args, get_origin


@dataclass(frozen=True)
class ModelConfig:
    """What a Transformer is made of. None means that the value is derived from other fields; a property returns it.

    Attributes:
        context_length: number of tokens the model is meant for. Learned positions end there; the other kinds go on,
        untested.
        key_value_heads: None means as many as heads (multi-head); 1 is multi-query, anything in between grouped-query
            attention.
        head_width: D; None means width / heads.
        output_bias: None means the same as `attention_bias`.
        window: a token sees itself and the window - 1 tokens before it; None means everything before it.
        qk_norm: RMS norm over each head's query and key, before positions are applied.
        attention_scale: scores are multiplied by it; None is 1 / sqrt(D).
        rope_layout: which coordinates turn together: "half" (i, i + D/2) as in Hugging Face's Llama, "interleaved"
            (2i, 2i + 1) as in the paper and in Meta's files.
        rope_scaling: how frequencies change beyond the context of training; see positions.py.
        norm_placement: "pre" x + f(norm(x)), "post" norm(x + f(x)), "sandwich" x + norm(f(norm(x))), "none" x + f(x).
        residual_scale: multiplies f(x) before it is added.
        hidden_width: of the MLP; None means 4 C, or 8/3 C rounded up to a multiple of 8 for the gated one (equal cost).
        experts: 0 is a single MLP; otherwise the number of experts, of which each token uses `experts_per_token`.
        latent_width: numbers cached per token in latent attention, beside `rope_head_width` shared rotary numbers.
        query_latent_width: None means that queries are computed directly from the stream.
        tied: the output matrix is the embedding.
        logit_softcap: logits are bent into (-cap, cap) by cap * tanh(logits / cap).
        balance_loss, z_loss: weights of the penalties in `Output.aux["penalty"]`.
        init: which row of the table in initialise.py.
    """

    vocab_size: int
    context_length: int = 256
    layers: int = 4
    width: int = 128
    heads: int = 4
    # attention
    attention: Literal["standard", "latent"] = "standard"
    key_value_heads: int | None = None
    head_width: int | None = None
    attention_bias: bool = False
    output_bias: bool | None = None
    qk_norm: bool = False
    window: int | None = None
    attention_scale: float | None = None
    # positions
    positions: Literal["rope", "learned", "sinusoidal", "alibi", "none"] = "rope"
    rope_base: float = 10_000.0
    rope_layout: Literal["half", "interleaved"] = "half"
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_original_context: int | None = None
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    yarn_fast: float = 32.0
    yarn_slow: float = 1.0
    # norms and residual paths
    norm: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "sandwich", "none"] = "pre"
    norm_epsilon: float = 1e-5
    residual: bool = True
    residual_scale: float = 1.0
    # the MLP
    mlp: Literal["swiglu", "gelu", "gelu_tanh", "relu", "relu2", "none"] = "swiglu"
    hidden_width: int | None = None
    mlp_bias: bool = False
    experts: int = 0
    experts_per_token: int = 2
    balance_loss: float = 0.01
    # latent attention
    latent_width: int | None = None
    query_latent_width: int | None = None
    rope_head_width: int | None = None
    value_head_width: int | None = None
    # embedding, head, training
    tied: bool = True
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    z_loss: float = 0.0
    init: Literal["gpt2", "fan_in", "zero_output"] = "gpt2"
    init_std: float = 0.02
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise ValueError(f"{field.name}={value!r} is unknown; choose one of {', '.join(get_args(field.type))}")
        for name in ("vocab_size", "context_length", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}: change one, or set head_width"
            )
        for name in (
            "key_value_heads",
            "head_width",
            "hidden_width",
            "latent_width",
            "rope_head_width",
            "value_head_width",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (or None), got {getattr(self, name)}")
        if self.heads % self.groups:
            raise ValueError(f"heads {self.heads} is not a multiple of key_value_heads {self.groups}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (a token sees itself), got {self.window}")
        if self.positions == "rope" and self.rotary_width % 2:
            raise ValueError(f"rotary positions turn pairs of coordinates: {self.rotary_width} of them is odd")
        if self.rope_scaling == "none" and self.rope_factor != 1:
            raise ValueError(f"rope_factor {self.rope_factor} does nothing without rope_scaling")
        if self.rope_factor <= 0 or self.rope_base <= 1:
            raise ValueError(f"need rope_factor > 0 and rope_base > 1, got {self.rope_factor} and {self.rope_base}")
        if self.attention == "latent":
            if None in (self.latent_width, self.rope_head_width, self.value_head_width):
                raise ValueError("latent attention needs latent_width, rope_head_width and value_head_width")
            if self.positions != "rope" or self.groups != self.heads or self.qk_norm:
                raise ValueError("latent attention is for rotary positions, without key_value_heads and qk_norm")
        if self.experts and (self.mlp != "swiglu" or self.mlp_bias or not 1 <= self.experts_per_token <= self.experts):
            raise ValueError("experts are gated MLPs (mlp='swiglu') without bias, 1 <= experts_per_token <= experts")

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.key_value_heads or self.heads

    @property
    def d_head(self) -> int:
        """D. In latent attention, the part of a query that carries no position."""
        return self.head_width or self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """Coordinates of a head that are turned."""
        return self.rope_head_width if self.attention == "latent" and self.rope_head_width else self.d_head

    @property
    def hidden(self) -> int:
        """Width inside the MLP."""
        return self.hidden_width or (8 * -(-self.width // 3) if self.mlp == "swiglu" else 4 * self.width)

    @property
    def gated(self) -> bool:
        return self.mlp == "swiglu"

    def but(self, **changes: Any) -> Self:
        """The same with some fields changed: how an ablation is written."""
        return replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A published shape by name, with fields changed. Raises ValueError that lists the names."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


GPT2 = {
    "vocab_size": 50_257,
    "context_length": 1024,
    "layers": 12,
    "width": 768,
    "heads": 12,
    "attention_bias": True,
    "positions": "learned",
    "norm": "layer",
    "mlp": "gelu_tanh",
    "mlp_bias": True,
}
MISTRAL = {
    "vocab_size": 32_000,
    "context_length": 32_768,
    "layers": 32,
    "width": 4096,
    "heads": 32,
    "key_value_heads": 8,
    "hidden_width": 14_336,
    "tied": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "context_length": 64, "layers": 2, "width": 32, "heads": 2},
    "small": {"vocab_size": 4096, "context_length": 256, "layers": 4, "width": 128, "heads": 4},
    "gpt2": GPT2,
    "gpt2-xl": {**GPT2, "layers": 48, "width": 1600, "heads": 25},
    "smollm2-135m": {
        "vocab_size": 49_152,
        "context_length": 8192,
        "layers": 30,
        "width": 576,
        "heads": 9,
        "key_value_heads": 3,
        "hidden_width": 1536,
        "rope_base": 100_000.0,
    },
    "llama-3.2-1b": {
        "vocab_size": 128_256,
        "context_length": 131_072,
        "layers": 16,
        "width": 2048,
        "heads": 32,
        "key_value_heads": 8,
        "hidden_width": 8192,
        "rope_base": 500_000.0,
        "rope_scaling": "llama3",
        "rope_factor": 32.0,
        "rope_original_context": 8192,
    },
    "qwen3-0.6b": {
        "vocab_size": 151_936,
        "context_length": 40_960,
        "layers": 28,
        "width": 1024,
        "heads": 16,
        "key_value_heads": 8,
        "head_width": 128,
        "hidden_width": 3072,
        "qk_norm": True,
        "rope_base": 1_000_000.0,
        "norm_epsilon": 1e-6,
    },
    "mistral-7b": {**MISTRAL, "window": 4096},
    "mixtral-8x7b": {**MISTRAL, "experts": 8, "rope_base": 1_000_000.0},
    "latent-1b": {  # no published model: DeepSeek-V3's attention at the width of Llama 3.2 1B
        "vocab_size": 128_256,
        "context_length": 8192,
        "layers": 16,
        "width": 2048,
        "heads": 16,
        "head_width": 128,
        "attention": "latent",
        "latent_width": 512,
        "query_latent_width": 1536,
        "rope_head_width": 64,
        "value_head_width": 128,
        "hidden_width": 8192,
        "rope_layout": "interleaved",
    },
}
