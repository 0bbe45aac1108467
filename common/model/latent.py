"""Multi-head latent attention (DeepSeek-V2, 2024): cache one small vector per token instead of all keys and values.

A token is compressed to a latent of `latent_width` numbers, from which each head makes its key and its value. The latent
cannot carry rotary positions, because the key that a head makes from it would have to be turned at every step again. So
there is a second, small key, which is turned and is shared by all heads.

There are two forms, equal up to rounding. The *expanded* form makes keys and values from the latents, and is cheap for a
whole sequence. The *absorbed* form moves that matrix to the other side of the product, q · (U c) = (U' q) · c, and attends
to the latents themselves as if they were one key-value head. It is cheap for a few queries against a long cache.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.model.attention import AttentionContext
from common.model.config import ModelConfig
from common.model.norms import Norm
from common.model.positions import turn
from common.model.surgery import weight_of


class LatentAttention(nn.Module):
    """(B, T, C) to (B, T, C), with R = latent_width, P = rope_head_width, D = d_head, E = value_head_width."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, width, bias = config.heads, config.width, config.attention_bias
        query_width = heads * (config.d_head + config.rope_head_width)
        if config.query_latent_width:
            self.query_down = nn.Linear(width, config.query_latent_width, bias=bias)
            self.query_norm = Norm("rms", config.query_latent_width, 1e-6)
        self.query = nn.Linear(config.query_latent_width or width, query_width, bias=False)
        self.down = nn.Linear(width, config.latent_width + config.rope_head_width, bias=bias)
        self.latent_norm = Norm("rms", config.latent_width, 1e-6)
        self.up = nn.Linear(config.latent_width, heads * (config.d_head + config.value_head_width), bias=False)
        self.output = nn.Linear(heads * config.value_head_width, width, bias=bias)
        self.scale = config.attention_scale or 1 / math.sqrt(config.d_head + config.rope_head_width)

    def forward(
        self, x: Float[Tensor, "B T C"], context: AttentionContext | None = None, *, absorbed: bool | None = None
    ) -> Float[Tensor, "B T C"]:
        """`absorbed` chooses the form; None takes the absorbed one if the cache already holds tokens."""
        config, context = self.config, context or AttentionContext()
        batch, length, _ = x.shape
        q = self.query(self.query_norm(self.query_down(x)) if config.query_latent_width else x)
        q = q.view(batch, length, config.heads, config.d_head + config.rope_head_width).transpose(
            1, 2
        )  # (B, H, T, D + P)
        q_plain, q_turned = q.split([config.d_head, config.rope_head_width], dim=-1)
        latent, k_turned = self.down(x).split([config.latent_width, config.rope_head_width], dim=-1)
        latent, k_turned = self.latent_norm(latent)[:, None], k_turned[:, None]  # (B, 1, T, R), (B, 1, T, P)
        if context.rotation is not None:
            q_turned, k_turned = (turn(y, *context.rotation, config.rope_layout) for y in (q_turned, k_turned))
        if absorbed is None:
            absorbed = context.cache is not None and context.cache.length > 0
        if context.cache is not None:
            latent, k_turned = context.cache.append(self.layer, latent, k_turned)
        form = self._absorbed if absorbed else self._expanded
        mixed = form(q_plain, q_turned, latent, k_turned, context)  # (B, H, T, E)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _expanded(
        self, q_plain: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, context: AttentionContext
    ) -> Tensor:
        config = self.config
        made = (
            self.up(latent[:, 0]).unflatten(-1, (config.heads, config.d_head + config.value_head_width)).transpose(1, 2)
        )  # (B, H, S, D + E)
        k_plain, v = made.split([config.d_head, config.value_head_width], dim=-1)
        q = torch.cat([q_plain, q_turned], dim=-1)
        k = torch.cat([k_plain, k_turned.expand(-1, config.heads, -1, -1)], dim=-1)
        return context.attend(q, k, v, scale=self.scale, dropout=config.dropout if self.training else 0.0)

    def _absorbed(
        self, q_plain: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, context: AttentionContext
    ) -> Tensor:
        config = self.config
        up = weight_of(self.up, latent).view(config.heads, -1, config.latent_width)  # (H, D + E, R)
        up_key, up_value = up.split([config.d_head, config.value_head_width], dim=1)
        q = torch.cat([q_plain @ up_key, q_turned], dim=-1)  # (B, H, T, R + P)
        k = torch.cat([latent, k_turned], dim=-1)  # (B, 1, S, R + P): one key-value head for all
        mixed = context.attend(q, k, latent, scale=self.scale, dropout=config.dropout if self.training else 0.0)
        return mixed @ up_value.transpose(1, 2)  # (B, H, T, R) -> (B, H, T, E)
