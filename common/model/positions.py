"""Order, five ways. Attention is a weighted sum: without one of these it reads a bag of tokens.

- learned (GPT-2): a table, added to the embeddings; it ends at `context_length`.
- sinusoidal (Vaswani et al. 2017, section 3.5): the same with a fixed table that never ends.
- ALiBi (Press et al. 2022): nothing is added to tokens; scores fall with distance, each head at its own rate.
- rotary (Su et al. 2021): queries and keys are turned by an angle proportional to their position, so that their product
  depends on the distance alone.
- none: the causal mask alone breaks the symmetry a little; see the notebook for how little.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.model.config import ModelConfig


def sinusoidal_table(positions: Int[Tensor, "..."], width: int) -> Float[Tensor, "... C"]:
    """sin and cos of position / 10000^(2i / C), in turns. Computed in double precision, because positions can be large."""
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    angles = positions[..., None].double() * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :width].float()


def alibi_slopes(heads: int) -> Float[Tensor, "H"]:
    """The authors' slopes: a geometric series that begins with 2^(-8/H).

    If H is no power of two, the series of the next lower power comes first, and every other slope of twice that many heads
    fills up the rest.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """

    def series(count: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / count) for i in range(count)]

    power = 2 ** math.floor(math.log2(heads))
    return torch.tensor(series(power) + series(2 * power)[::2][: heads - power])


def alibi_bias(slopes: Tensor, queries: Int[Tensor, "B T"], keys: Int[Tensor, "B S"]) -> Float[Tensor, "B H T S"]:
    """-slope * distance, to be added to the scores. `slopes` has the shape (H,)."""
    distance = (queries[:, :, None] - keys[:, None, :]).to(slopes.dtype)  # (B, T, S)
    return -slopes[None, :, None, None] * distance[:, None]


def rope_frequencies(config: ModelConfig) -> tuple[Float[Tensor, "R"], float]:
    """Returns (radians per position of each of the R = D / 2 pairs, a factor for cos and sin).

    Scalings extend the context beyond that of training, each of them `rope_factor` times:
        linear: all frequencies divided (Chen et al. 2023).
        ntk: the base raised so that only the slowest frequency is divided by the factor (the fixed "NTK-aware" form).
        yarn: fast frequencies kept, slow ones divided, a ramp between; and a warmer softmax (Peng et al. 2023).
        llama3: the same idea with bounds in wavelengths (Llama 3.1).
    """
    width, base, factor = config.rotary_width, config.rope_base, config.rope_factor
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    if config.rope_scaling == "ntk":
        base *= factor ** (width / (width - 2))
    plain = base**-exponents
    original = config.rope_original_context or config.context_length
    if config.rope_scaling == "linear":
        return (plain / factor).float(), 1.0
    if config.rope_scaling == "llama3":
        turns = original * plain / (2 * math.pi)  # full turns within the original context
        low, high = config.rope_low_frequency, config.rope_high_frequency
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (keep * plain + (1 - keep) * plain / factor).float(), 1.0
    if config.rope_scaling == "yarn":

        def pair_with(turns: float) -> float:
            """The (fractional) pair that makes this many turns within the original context."""
            return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_with(config.yarn_fast)), 0)
        high = min(math.ceil(pair_with(config.yarn_slow)), width - 1)
        ramp = (torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
        divide = ramp.clamp(0, 1)
        warmth = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return (divide * plain / factor + (1 - divide) * plain).float(), warmth
    return plain.float(), 1.0


def rope_angles(positions: Int[Tensor, "..."], frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (..., D / 2), in fp32: bf16 merges positions from 256 on (gallery: blocks/bf16-rope)."""
    angles = positions[..., None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Float[Tensor, "B H T D"], cos: Tensor, sin: Tensor, layout: str) -> Float[Tensor, "B H T D"]:
    """The formula: rotate each pair of coordinates by its angle. cos and sin broadcast against (B, H, T, D / 2)."""
    if layout == "half":  # pairs (i, i + D/2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    first, second = x[..., 0::2], x[..., 1::2]  # pairs (2i, 2i + 1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)


def wide(cos: Float[Tensor, "... R"], sin: Float[Tensor, "... R"], layout: str) -> tuple[Tensor, Tensor]:
    """Tables for `turn`: one value per coordinate instead of per pair, with the sign that the sine needs at each place."""
    if layout == "half":
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)


def turn(x: Float[Tensor, "B H T D"], cos: Tensor, sin: Tensor, layout: str) -> Float[Tensor, "B H T D"]:
    """`rotate` with the tables of `wide`: x * cos + partner * sin. Twice as fast, gradient included."""
    exact = x.to(torch.promote_types(x.dtype, cos.dtype))
    partner = (
        exact.roll(x.shape[-1] // 2, -1) if layout == "half" else exact.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    )
    return torch.addcmul(exact * cos, partner, sin).to(x.dtype)


def to_half_layout(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Reorder coordinates from the interleaved to the half layout; for the rows of a weight matrix from another project."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
