"""Attention: a weighted average of values, with weights from how well a query matches each key.

    weights = softmax(q · k / sqrt(D)),  output = weights · v          (Vaswani et al. 2017, section 3.2.1)

`attend_naive` is that line with every tensor in sight; `attend` is the fused kernel that models run. Tests check that both
give the same output and gradients, and that these are torch's. One module serves multi-head, grouped-query (Ainslie et al.
2023) and multi-query attention (Shazeer 2019): they differ in the number of key-value heads and in nothing else.

Letters for shapes: B rows, T queries, S keys, H query heads, G key-value heads, D width of a query and key, E width of a
value (equal to D except in latent attention).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from common.model.cache import Cache
from common.model.config import ModelConfig
from common.model.masks import causal_mask
from common.model.norms import Norm
from common.model.positions import turn


def attend_naive(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S E"],
    *,
    mask: Bool[Tensor, "B 1 T S"] | None = None,
    bias: Float[Tensor, "B H T S"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H T E"], Float[Tensor, "B H T S"]]:
    """Returns (output, weights). Each of the G key-value heads serves H / G neighbouring query heads.

    Args:
        mask: True where a query may see a key. None is the causal mask, where the queries are the last T of the S tokens.
        bias: is added to the scores (ALiBi).
        scale: the scores are multiplied by it; 1 / sqrt(D) by default, so that their spread does not grow with D.

    The output of a query that may see no key is zero, not NaN (gallery: attention/nan-row).
    """
    mask = causal_mask(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, -torch.inf)  # exp(-inf) is 0: hidden keys get no weight, and the rest sums to 1
    weights = scores.softmax(dim=-1)  # over the keys
    # A row in which everything is hidden is 0 / 0 in the softmax.
    weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return weights @ v, weights


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S E"],
    *,
    mask: Bool[Tensor, "B 1 T S"] | None = None,
    bias: Float[Tensor, "B H T S"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T E"]:
    """`attend_naive` without the weights, in one kernel that never writes the scores to memory."""
    queries, keys = q.shape[2], k.shape[2]
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not dropout and queries > 1 and keys <= WRITTEN_OUT:
        return _attend_by_products(q, k, v, mask, bias, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    causal = mask is None and queries == keys and queries > 1 and bias is None
    if mask is None and not causal and queries > 1:
        # torch's `is_causal` aligns the triangle with the upper left corner, which is right only where T == S.
        mask = causal_mask(queries, keys, device=q.device)  # gallery: attention/top-left-causal
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


# On a CPU in bf16, scores are written to memory for up to this many keys. Writing rounds them: where logits are large, the
# output is wrong by up to one per cent, while the fused kernel is wrong by 0.2 per cent.
WRITTEN_OUT = 1024


def _attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Float[Tensor, "B H T E"]:
    """The naive form with torch's batched products. On a CPU in bf16 it trains 2 to 3 times faster than the fused kernel."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    if heads != k.shape[1]:
        k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    mask = causal_mask(queries, keys, device=q.device)[None, None] if mask is None else mask
    # The lowest finite number, not -inf: a query that may see nothing must not become NaN.
    hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    hidden = (hidden if bias is None else (hidden + bias).to(q.dtype)).expand(batch, heads, queries, keys)
    scores = torch.baddbmm(hidden.flatten(0, 1), (q * scale).flatten(0, 1), k.flatten(0, 1).mT)
    mixed = (scores.softmax(dim=-1) @ v.flatten(0, 1)).view(batch, heads, queries, v.shape[-1])
    return mixed.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0) if len(mask) == batch else mixed


@dataclass
class AttentionContext:
    """What all attention layers of one forward pass share: it is made once by the Transformer and handed to each layer.

    Attributes:
        mask: (B, 1, T, S), True where a query may see a key; None for the plain causal mask.
        bias: (B, H, T, S), added to the scores (ALiBi); None for no bias.
        rotation: (cos, sin) for rotary positions, as `positions.wide` makes them. They broadcast against (B, H, T, D). None
            if the model has other positions.
        cache: keys and values of earlier tokens, or None.
        weights: a list to which each layer appends its attention weights, (B, H, T, S); None if nobody asked for them.
    """

    mask: Tensor | None = None
    bias: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    cache: Cache | None = None
    weights: list[Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """Attention by the fused kernel, or in the naive form if the weights are wanted: the kernel never has them."""
        if self.weights is None:
            return attend(q, k, v, mask=self.mask, bias=self.bias, scale=scale, dropout=dropout)
        out, weights = attend_naive(q, k, v, mask=self.mask, bias=self.bias, scale=scale)
        self.weights.append(weights.detach())
        return out


class Attention(nn.Module):
    """Causal self-attention, (B, T, C) to (B, T, C).

    The matrices are named after what they produce: `query` makes queries (C to H·D), `key` and `value` make keys and values
    (C to G·D), `output` goes back to the stream (H·D to C). The three widths may all differ.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, inner, shared = config.width, config.heads * config.d_head, config.groups * config.d_head
        self.query = nn.Linear(width, inner, bias=config.attention_bias)
        self.key = nn.Linear(width, shared, bias=config.attention_bias)
        self.value = nn.Linear(width, shared, bias=config.attention_bias)
        output_bias = config.attention_bias if config.output_bias is None else config.output_bias
        self.output = nn.Linear(inner, width, bias=output_bias)
        if config.qk_norm:
            self.query_norm = Norm("rms", config.d_head, config.norm_epsilon)
            self.key_norm = Norm("rms", config.d_head, config.norm_epsilon)

    def forward(self, x: Float[Tensor, "B T C"], context: AttentionContext | None = None) -> Float[Tensor, "B T C"]:
        config, context = self.config, context or AttentionContext()
        batch, length, _ = x.shape
        # 1. Each token makes a query for every head, and a key and a value for every key-value head:
        #        (B, T, C) -> (B, T, H·D) -> (B, T, H, D) -> (B, H, T, D)
        # Heads come before time, so that the products below compare tokens within one head. A view straight to
        # (B, H, T, D) has the right shape too, and mixes tokens with heads (gallery: attention/heads-by-view).
        q = self.query(x).view(batch, length, config.heads, config.d_head).transpose(1, 2)  # (B, H, T, D)
        k = self.key(x).view(batch, length, config.groups, config.d_head).transpose(1, 2)  # (B, G, T, D)
        v = self.value(x).view(batch, length, config.groups, config.d_head).transpose(1, 2)  # (B, G, T, D)
        # 2. Optional: a norm over the D numbers of each head bounds the scores, however large the query and key matrices
        # grow (Qwen3). It comes before the rotation because its weight differs by coordinate, and a rotation mixes
        # coordinates.
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        # 3. Rotary positions: turn queries and keys, so that q · k depends on how far apart the two tokens are. Values are
        # not turned, because they are not compared with anything.
        if context.rotation is not None:
            q, k = (turn(y, *context.rotation, config.rope_layout) for y in (q, k))
        # 4. Append the new keys and values to those of earlier tokens, and get all of them back: T becomes S in k and v.
        # Keys are stored already turned, because the position of a token never changes.
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)  # (B, G, S, D)
        # 5. Compare, softmax, average. Here, and only here, do tokens of different positions meet.
        dropout = config.dropout if self.training else 0.0
        mixed = context.attend(q, k, v, scale=config.attention_scale, dropout=dropout)  # (B, H, T, D)
        # 6. Put the heads side by side again, (B, T, H·D), and let `output` mix them and write to the residual stream. The
        # transpose has to undo that of step 1 before anything is flattened.
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
