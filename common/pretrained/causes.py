"""Why a stage differs from the reference: known mistakes, tried out.

Each hypothesis is a computation: *if the reference did this, its numbers would be those*. One that reproduces the reference
is named, with how well; otherwise the pattern of the difference is described. They are the mistakes of the gallery of June
and of the issue trackers it cites; a list, not an oracle.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.attention import attend_naive
from common.model.mlp import ACTIVATIONS
from common.model.norms import layer_norm, rms_norm
from common.model.positions import rope_angles, rope_frequencies, rotate
from common.model.transformer import Transformer
from common.pretrained.names import rows_to_half

BASES = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0)
EPSILONS = (1e-3, 1e-5, 1e-6, 1e-8, 1e-12)
Guess = tuple[str, Tensor]


@torch.no_grad()
def likely_cause(
    stage: Any, model: Transformer, mine: Tensor, reference: Mapping[str, Tensor], inputs: tuple, tolerance: float
) -> str:
    """In words. `stage` is a parity.Stage; `inputs` are those of our module, taken from the reference."""
    theirs = reference[stage.name]
    if mine.numel() != theirs.numel():
        return f"shapes: ours is {tuple(mine.shape)}, theirs {tuple(theirs.shape)}"
    theirs = theirs.reshape(mine.shape)
    module = model.get_submodule(stage.ours)
    plain = _our_own_fault(stage, model, module, mine, theirs, reference, tolerance)
    if plain:
        return plain
    best: tuple[float, str] = (math.inf, "")
    for text, made in _guesses(stage, model, module, reference, inputs):
        if made.shape == theirs.shape:
            best = min(best, (_apart(made, theirs), text))
    if best[0] <= 5 * tolerance:
        return f"{best[1]} (with that, the stage agrees to {best[0]:.0e})"
    return _pattern(mine.double(), theirs.double())


def _our_own_fault(
    stage: Any, model: Transformer, module: nn.Module, mine: Tensor, theirs: Tensor, reference: Mapping[str, Tensor],
    tolerance: float,
) -> str:  # fmt: skip
    """What can be seen on our side alone; empty where nothing can."""
    if stage.kind == "norm" and bool((module.weight == 1).all()):
        return "our weight is all ones, as before any training: this layer was never loaded"
    for kept in (torch.bfloat16, torch.float16):
        if stage.kind == "embedding" and torch.equal(theirs.to(kept).to(mine.dtype), mine):
            return f"our weights are those of the reference, rounded to {kept}"
    if stage.kind == "heads" and model.config.positions == "rope":
        mixed = _mixer(stage, model, reference)
        if _apart(mixed(), theirs) <= 5 * tolerance:  # our config is right, and what we compute is not what it says
            for form in (torch.bfloat16, torch.float16):
                if _apart(mixed(form=form), mine) <= 5 * tolerance:
                    return f"our rotary angles are computed in {form}"
            return "our config gives the reference's numbers when it is computed plainly: the computation is at fault"
    return ""


def _apart(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30))


def _guesses(
    stage: Any, model: Transformer, module: nn.Module, reference: Mapping[str, Tensor], inputs: tuple
) -> Iterator[Guess]:
    if stage.kind == "norm":
        yield from _norms(module, inputs[0], stage.heads_first)
    elif stage.kind == "heads":
        yield from _heads(stage, model, reference)
    elif stage.kind == "activation":
        layer = stage.name.split(",")[0]
        up, gate = reference[f"{layer}, up"], reference.get(f"{layer}, gate")
        for name, function in ACTIVATIONS.items():
            if gate is None:
                yield f"the activation of the reference is {name}, ours is {model.config.mlp}", function(up)
            else:
                yield f"the gate of the reference goes through {name}", function(gate) * up
                yield f"gate and up are exchanged, with {name} between", function(up) * gate
    elif stage.kind == "embedding":
        for scale in (math.sqrt(model.config.width), 1 / math.sqrt(model.config.width)):
            yield f"the reference multiplies embeddings by {scale:.4g}", module(inputs[0]) * scale
    elif stage.kind == "logits":
        yield (
            "the head of the reference is its embedding, ours is not",
            F.linear(inputs[0], model.embedding.weight),
        )
        yield from _products(module, inputs[0], model, "head")
    elif isinstance(module, nn.Linear):
        yield from _products(module, inputs[0], model, stage.kind)
        if stage.kind in ("query", "key", "value", "gate", "up"):
            yield from _exchanged(stage, module(inputs[0]), reference)


def _exchanged(stage: Any, mine: Tensor, reference: Mapping[str, Tensor]) -> Iterator[Guess]:
    kinds = {"gate", "up"} if stage.kind in ("gate", "up") else {"query", "key", "value"}
    for kind in sorted(kinds - {stage.kind}):
        other = reference.get(stage.name.replace(stage.kind, kind), torch.empty(0))
        if other.numel() == mine.numel() and torch.allclose(mine, other.reshape(mine.shape), rtol=1e-3, atol=1e-4):
            yield f"our {stage.kind} is the reference's {kind}", reference[stage.name].reshape(mine.shape)


def _norms(module: nn.Module, x: Tensor, heads_first: bool) -> Iterator[Guess]:
    weight, bias = module.weight, module.bias
    zero = torch.zeros_like(weight) if bias is None else bias

    def seen(made: Tensor) -> Tensor:
        return made.transpose(1, 2) if heads_first else made

    for epsilon in EPSILONS:
        said = f"the reference adds epsilon {epsilon:g}, ours {module.epsilon:g}"
        made = rms_norm(x, weight, epsilon) if module.kind == "rms" else layer_norm(x, weight, bias, epsilon)
        yield said, seen(made)
    yield "the reference multiplies by 1 + weight", seen(rms_norm(x, 1 + weight, module.epsilon))
    yield "our weight has 1 added that the reference does not add", seen(rms_norm(x, weight - 1, module.epsilon))
    yield "the reference is LayerNorm, ours RMSNorm", seen(layer_norm(x, weight, zero, module.epsilon))
    yield "the reference is RMSNorm, ours LayerNorm", seen(rms_norm(x, weight, module.epsilon))
    yield (
        "our weights were never loaded: those of the reference are ones",
        seen(rms_norm(x, torch.ones_like(weight), module.epsilon)),
    )


def _products(module: nn.Linear, x: Tensor, model: Transformer, kind: str) -> Iterator[Guess]:
    w, b, config = module.weight, module.bias, model.config
    if w.shape[0] == w.shape[1]:
        yield "our matrix is transposed (square ones hide it)", F.linear(x, w.T, b)
    if kind in ("query", "key"):
        heads = config.heads if kind == "query" else config.groups
        said = "rows of our matrix are in the order of {}: undo the converter's permutation of Q and K"
        yield said.format("interleaved rotary positions"), F.linear(x, rows_to_half(w, heads), b)
        yield said.format("the half layout, permuted once too often"), F.linear(x, _rows_to_interleaved(w, heads), b)
    if b is not None:
        yield "the reference has no bias here", F.linear(x, w)
    for kept in (torch.bfloat16, torch.float16):
        yield f"the weights of the reference are rounded to {kept}", F.linear(x, w.to(kept).to(w.dtype), b)
    if kind == "head":
        return
    half = w.shape[0] // 2
    if not w.shape[0] % 2:
        yield "the two halves of our matrix are exchanged", F.linear(x, torch.cat([w[half:], w[:half]]), b)


def _rows_to_interleaved(w: Tensor, heads: int) -> Tensor:
    split = w.unflatten(0, (heads, 2, -1))  # (H, 2, D/2, I)
    return split.transpose(1, 2).flatten(0, 2)


def _mixer(stage: Any, model: Transformer, reference: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """Attention of the reference's own queries, keys and values: under our rules, or others that are given."""
    config, layer = model.config, stage.name.split(",")[0]
    q, k, v = (reference[f"{layer}, {kind}"] for kind in ("query", "key", "value"))
    if config.qk_norm:
        q, k = reference[f"{layer}, query norm"], reference[f"{layer}, key norm"]
    q, k, v = (t.reshape(*v.shape[:2], -1, config.d_head).transpose(1, 2) for t in (q, k, v))
    places = torch.arange(q.shape[2], device=q.device)[None]

    def mixed(
        layout: str = config.rope_layout, base: float = config.rope_base, *, rotary: bool = config.positions == "rope",
        scale: float | None = config.attention_scale, form: torch.dtype | None = None, tiled: bool = False,
        masked: bool = True, scaling: str = config.rope_scaling, window: int | None = config.window,
    ) -> Tensor:  # fmt: skip
        a, b, values = q, k, v
        if rotary:
            other = config.but(
                rope_base=base, rope_scaling=scaling, rope_factor=1.0 if scaling == "none" else config.rope_factor
            )
            frequencies, factor = rope_frequencies(other)
            if form is None:
                cos, sin = rope_angles(places, frequencies, factor)
            else:
                angles = (places[..., None].to(form) * frequencies.to(form)).float()
                cos, sin = angles.cos().to(form).float() * factor, angles.sin().to(form).float() * factor
            a, b = (rotate(t, cos[:, None], sin[:, None], layout) for t in (a, b))
        if tiled:
            repeats = a.shape[1] // b.shape[1]
            b, values = b.repeat(1, repeats, 1, 1), values.repeat(1, repeats, 1, 1)
        near = (places[0][:, None] - places[0][None, :]) < (window or 1 << 60)
        mask = near & (torch.ones_like(near).tril() if masked else torch.ones_like(near))
        out, _ = attend_naive(a, b, values, mask=mask[None, None], scale=scale)
        return out.transpose(1, 2).flatten(2)

    return mixed


def _heads(stage: Any, model: Transformer, reference: Mapping[str, Tensor]) -> Iterator[Guess]:
    config, mixed = model.config, _mixer(stage, model, reference)
    if config.positions == "rope":
        other = "interleaved" if config.rope_layout == "half" else "half"
        yield (
            f"the reference turns coordinates in the {other} layout, ours in the {config.rope_layout} one",
            mixed(other),
        )
        for base in BASES:
            if base != config.rope_base:
                yield (
                    f"the base of the reference's rotary positions is {base:,.0f}, ours {config.rope_base:,.0f}",
                    mixed(base=base),
                )
        yield "the reference turns nothing", mixed(rotary=False)
        if config.rope_scaling != "none":
            yield "the reference does not scale its rotary positions, ours does", mixed(scaling="none")
        for form in (torch.bfloat16, torch.float16):
            yield f"the reference computes its rotary angles in {form}", mixed(form=form)
    if config.groups != config.heads:
        yield "key-value heads serve other query heads: tiled, not repeated side by side", mixed(tiled=True)
    scales = (
        (1.0, "1"),
        (config.d_head**-0.5, "1 / sqrt(D)"),
        (1 / config.d_head, "1 / D"),
        (config.width**-0.5, "1 / sqrt(C)"),
    )
    for scale, said in scales:
        yield f"the reference scales scores by {said}", mixed(scale=scale)
    yield "the reference is not causal", mixed(masked=False)
    if config.window is not None:
        yield "the reference has no window, ours has", mixed(window=None)


def _pattern(mine: Tensor, theirs: Tensor) -> str:
    """What the difference looks like, where no hypothesis explains it."""
    difference, size = (mine - theirs).abs(), float(theirs.abs().max())
    near = 1e-4 * size
    if difference.ndim == 3:
        by_place = difference.amax(dim=(0, 2))
        if by_place[0] <= near < by_place.max():
            first = int((by_place > near).nonzero()[0])
            return f"no hypothesis fits; it agrees before position {first}: positions, a mask or a window"
        by_channel = difference.amax(dim=(0, 1))
        wrong = (by_channel > near).nonzero().flatten()
        if len(wrong) and len(wrong) <= 0.5 * len(by_channel):
            some = f"{len(wrong)} of {len(by_channel)} channels differ, the first is {int(wrong[0])}"
            return f"no hypothesis fits; {some}: rows of a matrix"
        shift = mine - theirs
        if float((shift - shift.mean(dim=(0, 1))).abs().max()) <= near:
            return "a constant is missing from one side or added on the other: a bias"
    whole = float((mine * theirs).sum() / theirs.square().sum())
    if float((mine - whole * theirs).abs().max()) <= near:
        return f"ours is {whole:.4g} times theirs: a scale"
    return "no hypothesis fits: other weights, or another formula"
