"""What a config costs, before anything is allocated: arithmetic on the config alone.

FLOPs count multiplications and additions of matrix products, two for each weight that a token meets; norms and activations
are left out (about one per cent). Tests compare with torch's counter on every preset.
"""

from common.model.cache import cache_shapes
from common.model.config import ModelConfig


def matmul_weights(config: ModelConfig) -> int:
    """The number of weights that one token is multiplied with in a forward pass; of the experts, only those it uses."""
    c, h, d = config.width, config.heads, config.d_head
    if config.attention == "latent":
        rank, turned, value = config.latent_width, config.rope_head_width, config.value_head_width
        queries = h * (d + turned)
        squeezed = config.query_latent_width
        attention = c * squeezed + squeezed * queries if squeezed else c * queries
        attention += c * (rank + turned) + rank * h * (d + value) + h * value * c
    else:
        attention = 2 * c * h * d + 2 * c * config.groups * d
    mlp = 0
    if config.mlp != "none":
        one = (3 if config.gated else 2) * c * config.hidden
        mlp = config.experts_per_token * one + c * config.experts if config.experts else one
    return config.layers * (attention + mlp) + c * config.vocab_size


def flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs of a forward pass for one token that is compared with `context` keys (T keys for a sequence of T in one pass).

    This counts the full T x T product; a kernel that skips the masked half does less. Training costs three times as much,
    because the backward pass has two products for each one of the forward pass.
    """
    if config.attention == "latent":
        per_key = config.heads * (config.d_head + config.rope_head_width + config.value_head_width)
    else:
        per_key = 2 * config.heads * config.d_head
    return 2 * matmul_weights(config) + 2 * config.layers * context * per_key


def kv_bytes_per_token(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Bytes that the cache keeps for one token of one sequence."""
    return config.layers * bytes_per_number * sum(n * w for n, w in cache_shapes(config))
