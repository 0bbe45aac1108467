"""Why a stage differs from the reference: known mistakes, tried out.

Each hypothesis is a computation: *if this were so, the numbers would be those*. One is named only if its numbers agree where
ours did not, and much better than ours did; otherwise the pattern of the difference is described. They are the mistakes of
the gallery of June and of the issue trackers it cites; a list, not an oracle.

A rule (another epsilon, another base) is looked for on both sides. If our weights and config, computed plainly, give the
numbers of the reference, then what we run is not what our config says, and the rule is looked for in our numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.attention import attend_naive
from common.model.mlp import ACTIVATIONS, MixtureOfExperts
from common.model.norms import layer_norm, rms_norm
from common.model.positions import rope_frequencies, rotate
from common.model.transformer import Transformer
from common.pretrained.names import rows_to_half, rows_to_interleaved

BASES = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0)
EPSILONS = (1e-3, 1e-5, 1e-6, 1e-8, 1e-12)
ALIKE = (("query", "key", "value"), ("gate", "up"))  # what has one shape, or may have
NARROW = (torch.bfloat16, torch.float16)
Guess = tuple[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One stage that differs.

    Attributes:
        stage: a parity.Stage.
        module: ours; in a gated MLP without experts, its last matrix.
        mine, theirs: the numbers, in the same shape.
        x: what the module was given, taken from the reference.
        reference: every stage of the reference by name.
    """

    stage: Any
    model: Transformer
    module: nn.Module
    mine: Tensor
    theirs: Tensor
    x: Tensor
    reference: Mapping[str, Tensor]

    def of_layer(self, what: str) -> Tensor:
        return self.reference[f"{self.stage.name.split(',')[0]}, {what}"]


@torch.no_grad()
def likely_cause(
    stage: Any, model: Transformer, mine: Tensor, reference: Mapping[str, Tensor], inputs: tuple, tolerance: float
) -> str:
    """In words. `stage` is a parity.Stage; `inputs` are those of our module, taken from the reference."""
    theirs = reference[stage.name]
    if mine.numel() != theirs.numel() or mine.shape[-1] != theirs.shape[-1]:
        return f"shapes: ours is {tuple(mine.shape)}, theirs {tuple(theirs.shape)}"
    theirs = theirs.reshape(mine.shape)
    for who, numbers in (("ours", mine), ("the reference", theirs)):
        if not bool(numbers.isfinite().all()):
            return f"{who} holds infinities or NaN"
    error = _apart(mine, theirs)
    if mine.dtype != theirs.dtype and error <= 8 * max(torch.finfo(t.dtype).eps for t in (mine, theirs)):
        return f"rounding: ours computes in {mine.dtype}, the reference in {theirs.dtype}"
    module, x = model.get_submodule(stage.ours) if stage.ours else nn.Identity(), inputs[0]
    if stage.kind == "MLP" and not isinstance(module, MixtureOfExperts):
        module, x = module.down, reference[stage.name.replace("MLP", "activation")]
    case, near = Case(stage, model, module, mine, theirs, x, reference), min(tolerance, error / 4)
    plain = _plain(case)
    if plain is not None and _apart(plain, theirs) <= near:
        said, rest = _best(_rules(case), mine, near)
        fault = f"ours {said}" if said else "the computation is at fault"
        return f"our weights and config give the reference's numbers when they are computed plainly: {fault}{rest}"
    said, rest = _best(_rules(case), theirs, near)
    if said:
        return f"the reference {said}{_own(case, said)}{rest}"
    said, rest = _best(_weights(case, near), theirs, near)
    return said + rest or _seen(case, near) or _pattern(case)


def _best(guesses: Iterator[Guess], numbers: Tensor, near: float) -> tuple[str, str]:
    """(the guess that makes these numbers, how well), or nothing."""
    error, said = min(((_apart(made, numbers), said) for said, made in guesses if made.shape == numbers.shape),
                      default=(math.inf, ""))  # fmt: skip
    return (said, f" (with that, the stage agrees to {error:.0e})") if error <= near else ("", "")


def _apart(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30))


def _own(case: Case, said: str) -> str:
    """What ours does instead, where that is a number or a name."""
    config = case.model.config
    scale = config.d_head**-0.5 if config.attention_scale is None else config.attention_scale
    ours = {
        "adds epsilon": f"{config.norm_epsilon:g}",
        "turns coordinates": f"the {config.rope_layout} one",
        "has the base": f"{config.rope_base:,.0f}",
        "scales scores": f"{scale:.4g}",
        "sees a window": "no window" if config.window is None else str(config.window),
        "applies": config.mlp,
        "chooses": str(config.experts_per_token),
    }
    return next((f", ours {own}" for start, own in ours.items() if said.startswith(start)), "")


def _plain(case: Case) -> Tensor | None:
    """The stage from our weights and our config, each formula as it stands in a book; None where there is none."""
    kind, module, config = case.stage.kind, case.module, case.model.config
    if kind == "norm":
        return _normed(case, config.norm_epsilon)
    if kind == "heads":
        return _mixer(case)()
    if kind == "activation":
        return _activated(case, config.mlp)
    if kind == "embedding":
        return module.weight[case.x]
    if isinstance(module, MixtureOfExperts):
        return _experts(case)
    return F.linear(case.x, module.weight, module.bias) if isinstance(module, nn.Linear) else None


def _rules(case: Case) -> Iterator[Guess]:
    """What either side might do, to be read after "the reference" or "ours"."""
    kind = case.stage.kind
    if kind == "norm":
        yield from _norms(case)
    elif kind == "heads":
        yield from _heads(case)
    elif kind == "activation":
        for name in ACTIVATIONS:
            yield f"applies {name}", _activated(case, name)
            if case.model.config.gated:
                yield f"exchanges gate and up, with {name} between", _activated(case, name, exchanged=True)
    elif kind == "embedding":
        for scale in (math.sqrt(case.model.config.width), 1 / math.sqrt(case.model.config.width)):
            yield f"multiplies embeddings by {scale:.4g}", case.module.weight[case.x] * scale
    elif isinstance(case.module, MixtureOfExperts):
        for count in range(1, case.module.count + 1):
            yield f"chooses {count} experts for a token", _experts(case, chosen=count)
        yield "does not scale the probabilities of the chosen experts to one", _experts(case, scaled=False)
        yield "exchanges gate and up in its experts", _experts(case, exchanged=True)


def _normed(
    case: Case, epsilon: float, weight: Tensor | None = None, bias: Tensor | None = None, kind: str | None = None
) -> Tensor:
    module, kind = case.module, kind or case.module.kind
    weight, bias = module.weight if weight is None else weight, module.bias if bias is None else bias
    made = rms_norm(case.x, weight, epsilon) if kind == "rms" else layer_norm(case.x, weight, bias, epsilon)
    return made.transpose(1, 2) if case.stage.heads_first else made


def _norms(case: Case) -> Iterator[Guess]:
    module, own = case.module, case.model.config.norm_epsilon
    for epsilon in sorted({*EPSILONS, own, module.epsilon}):
        yield f"adds epsilon {epsilon:g}", _normed(case, epsilon)
    yield "multiplies by 1 + weight", _normed(case, own, 1 + module.weight)
    yield "multiplies by our weight less 1: ours has 1 added", _normed(case, own, module.weight - 1)
    yield "multiplies by ones", _normed(case, own, torch.ones_like(module.weight))
    if module.kind == "rms":
        yield "subtracts the mean: it is LayerNorm", _normed(case, own, kind="layer")
    else:
        yield "does not subtract the mean: it is RMSNorm", _normed(case, own, kind="rms")


def _activated(case: Case, name: str, *, exchanged: bool = False) -> Tensor:
    up, function = case.of_layer("up"), ACTIVATIONS[name]
    if not case.model.config.gated:
        return function(up)
    gate = case.of_layer("gate")
    return function(up) * gate if exchanged else function(gate) * up


def _experts(case: Case, chosen: int | None = None, *, scaled: bool = True, exchanged: bool = False) -> Tensor:
    """Every expert on every token, weighted."""
    module, flat = case.module, case.x.flatten(0, -2)
    weights, which = module.router(flat).float().softmax(dim=-1).topk(chosen or module.chosen, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True) if scaled else weights
    share = torch.zeros(len(flat), module.count, device=flat.device).scatter(1, which, weights).to(flat.dtype)
    made = torch.zeros_like(flat)
    for e in range(module.count):
        gate, up = (module.up, module.gate) if exchanged else (module.gate, module.up)
        made += share[:, e, None] * ((F.silu(flat @ gate[e].T) * (flat @ up[e].T)) @ module.down[e].T)
    return made.view_as(case.mine)


def _mixer(case: Case) -> Callable[..., Tensor]:
    """Attention of the reference's own queries, keys and values: under our rules, or others that are given."""
    config = case.model.config
    q, k, v = (case.of_layer(kind) for kind in ("query", "key", "value"))
    if config.qk_norm:
        q, k = case.of_layer("query norm"), case.of_layer("key norm")
    q, k, v = (t.reshape(*v.shape[:2], -1, config.d_head).transpose(1, 2).float() for t in (q, k, v))
    places = torch.arange(q.shape[2], device=q.device)[None]

    def mixed(
        layout: str = config.rope_layout, base: float = config.rope_base, *, rotary: bool = config.positions == "rope",
        scale: float | None = config.attention_scale, narrow: Mapping[str, torch.dtype] = {}, tiled: bool = False,
        masked: bool = True, scaling: str = config.rope_scaling, window: int | None = config.window,
    ) -> Tensor:  # fmt: skip
        a, b, values = q, k, v
        if rotary:
            times = 1.0 if scaling == "none" else config.rope_factor
            other = config.but(rope_base=base, rope_scaling=scaling, rope_factor=times)
            frequencies, factor = rope_frequencies(other)
            frequencies = frequencies.to(narrow.get("frequencies", torch.float32)).float().to(q.device)
            form = narrow.get("angles", torch.float32)
            angles = (places[..., None].to(form) * frequencies.to(form)).float()
            cos, sin = (t.to(narrow.get("tables", form)).float() * factor for t in (angles.cos(), angles.sin()))
            a, b = (rotate(t, cos[:, None], sin[:, None], layout) for t in (a, b))
        if tiled:
            b, values = (t.repeat(1, a.shape[1] // t.shape[1], 1, 1) for t in (b, values))
        near = (places[0][:, None] - places[0][None, :]) < (window or 1 << 60)
        mask = near & (torch.ones_like(near).tril() if masked else torch.ones_like(near))
        out, _ = attend_naive(a, b, values, mask=mask[None, None], scale=scale)
        return out.transpose(1, 2).flatten(2)

    return mixed


def _heads(case: Case) -> Iterator[Guess]:
    config, mixed = case.model.config, _mixer(case)
    if config.positions == "rope":
        for layout in ("half", "interleaved"):
            yield f"turns coordinates in the {layout} layout", mixed(layout)
        for base in sorted({*BASES, config.rope_base}):
            yield f"has the base {base:,.0f} of its rotary positions", mixed(base=base)
        yield "turns nothing: it has no rotary positions", mixed(rotary=False)
        if config.rope_scaling != "none":
            yield "does not scale its rotary positions", mixed(scaling="none")
        for form in NARROW:
            yield f"computes its rotary angles in {form}", mixed(narrow={"angles": form})
            yield f"rounds its rotary frequencies to {form}", mixed(narrow={"frequencies": form})
            yield f"rounds its cosines and sines to {form}", mixed(narrow={"tables": form})
    elif config.d_head % 2 == 0:
        for base in BASES:
            yield f"has rotary positions of base {base:,.0f}", mixed(base=base, rotary=True)
    if config.groups != config.heads:
        yield "gives key-value heads to query heads in turn (tiled), not to neighbours (repeated)", mixed(tiled=True)
    for scale, said in ((1.0, "1"), (config.d_head**-0.5, "1 / sqrt(D)"), (1 / config.d_head, "1 / D"),
                        (config.width**-0.5, "1 / sqrt(C)")):  # fmt: skip
        yield f"scales scores by {said} = {scale:.4g}", mixed(scale=scale)
    yield "is not causal", mixed(masked=False)
    yield "sees everything before: no window", mixed(window=None)
    for window in sorted({1, _first_place(case), config.window or 1}):
        yield f"sees a window of {window}", mixed(window=window)


def _weights(case: Case, near: float) -> Iterator[Guess]:
    """Whole sentences about matrices."""
    module, model, kind, x = case.module, case.model, case.stage.kind, case.x
    if not isinstance(module, nn.Linear):
        return
    w, b, config = module.weight, module.bias, model.config
    if w.shape[0] == w.shape[1]:
        yield "our matrix is transposed (square ones hide it)", F.linear(x, w.T, b)
    if kind in ("query", "key"):
        heads = config.heads if kind == "query" else config.groups
        for made, said in (
            (rows_to_half, "in the order of interleaved rotary positions: undo the converter's permutation of Q and K"),
            (rows_to_interleaved, "permuted once too often: they were in the order of the half layout"),
        ):
            yield f"rows of our matrix are {said}", F.linear(x, made(w, heads), None if b is None else made(b, heads))
    if b is not None:
        yield "the reference has no bias here", F.linear(x, w)
    for kept in NARROW:
        yield f"the weights of the reference are rounded to {kept}", F.linear(x, w.to(kept).to(w.dtype), b)
    if kind == "logits":
        yield "the head of the reference is its embedding, ours is not", F.linear(x, model.embedding.weight)
        return
    for i in range(config.layers):
        other = model.get_submodule(_in_layer(case, i))
        if other is not module:
            yield f"the matrix of the reference is that of our layer {i}", F.linear(x, other.weight, other.bias)
    half = w.shape[0] // 2
    if not w.shape[0] % 2:
        yield "the two halves of our matrix are exchanged", F.linear(x, torch.cat([w[half:], w[:half]]), b)
    for other in next((kinds for kinds in ALIKE if kind in kinds), ()):
        found = case.reference.get(case.stage.name.replace(kind, other), case.theirs)
        if other != kind and found.numel() == case.mine.numel() and _apart(case.mine, found) <= near:
            yield f"our {kind} is the reference's {other}", case.theirs


def _in_layer(case: Case, layer: int) -> str:
    """The path of the module in another layer."""
    parts = case.stage.ours.split(".")
    return ".".join([parts[0], str(layer), *parts[2:], *(["down"] if case.stage.kind == "MLP" else [])])


def _seen(case: Case, near: float) -> str:
    """What the two sides show, where no formula gives the one from the other."""
    kind, mine, theirs, module = case.stage.kind, case.mine, case.theirs, case.module
    if kind in ("norm", "query", "key", "value", "attention", "gate", "up", "MLP") and _is_shifted(case):
        return "a constant is missing from one side or added on the other: a bias"
    if kind == "norm" and _is_reweighted(case, near):
        if bool((module.weight == 1).all()):
            return "our weight is all ones, as before any training: this layer was never loaded"
        return "the norm is the same, its weights are not: other weights"
    for kept in NARROW if mine.dtype.itemsize > 2 else ():
        if kind == "embedding" and torch.equal(theirs.to(kept).to(mine.dtype), mine):
            return f"our weights are those of the reference, rounded to {kept}"
        if isinstance(module, nn.Linear) and torch.equal(module.weight.to(kept).to(mine.dtype), module.weight):
            step = torch.finfo(kept).eps / 2  # the most that rounding moves a number, relative to it
            most = step * 1.01 * F.linear(case.x.abs(), module.weight.abs()) + near * theirs.abs().max()
            if bool(((mine - theirs).abs() <= most).all()):
                return f"our weights are rounded to {kept}, and the difference is as small: the reference's are not rounded"
    if kind == "stream":
        return _shares(case, near)
    if kind == "output" and case.model.config.logit_softcap:
        return f"ours bends its logits (logit_softcap={case.model.config.logit_softcap:g}), the reference may not"
    return ""


def _is_shifted(case: Case) -> bool:
    """Whether the two differ by the same numbers at every token."""
    shift, small = (case.mine.double() - case.theirs.double()).flatten(0, -2), _small(case)
    return len(shift) > 4 and float(shift.abs().max()) > 3 * small >= 3 * float((shift - shift.mean(dim=0)).abs().max())


def _is_reweighted(case: Case, near: float) -> bool:
    """Whether the reference is our norm with some other weight (and bias) for each channel."""
    bare = torch.zeros_like(case.module.weight) if case.module.kind == "layer" else None
    made = _normed(case, case.model.config.norm_epsilon, torch.ones_like(case.module.weight), bare)
    n, t = made.flatten(0, -2).double(), case.theirs.flatten(0, -2).double()
    if bare is not None:
        n, shift = n - n.mean(dim=0), t.mean(dim=0)
        t = t - shift
    return len(n) > 4 and _apart((n * t).sum(dim=0) / n.square().sum(dim=0).clamp(min=1e-30) * n, t) <= near


def _shares(case: Case, near: float) -> str:
    """How much of the stream before, of attention and of the MLP each side adds up."""
    layer, reference, parts = case.stage.name.split(",")[0], case.reference, {}
    if layer == case.stage.name:  # the start
        parts = {name: reference[name] for name in ("embedding", "positions") if name in reference}
    else:
        number = int(layer.removeprefix("layer "))
        parts["stream before"] = reference[f"layer {number - 1}, stream" if number else "start of the stream"]
        parts["attention"] = case.of_layer("attention")
        if not case.stage.entry:
            parts["MLP"] = case.of_layer("MLP")
    columns = torch.stack([t.expand_as(case.mine).double().flatten() for t in parts.values()], dim=-1)
    found = []
    for numbers in (case.mine, case.theirs):
        wanted = numbers.double().flatten()[:, None]
        shares = torch.linalg.lstsq(columns, wanted).solution
        if _apart(columns @ shares, wanted) > near:
            return ""
        found.append(" + ".join(f"{round(float(a), 6) + 0.0:.4g} {b}" for a, b in zip(shares, parts, strict=True)))
    return f"ours is {found[0]}, the reference {found[1]}"


def _small(case: Case) -> float:
    """What counts as no difference beside the largest one."""
    rounding = 16 * torch.finfo(case.mine.dtype).eps * float(case.theirs.abs().max())
    return max(0.02 * float((case.mine.double() - case.theirs.double()).abs().max()), rounding)


def _first_place(case: Case) -> int:
    """The first position that differs."""
    by_place = (case.mine.double() - case.theirs.double()).abs().amax(dim=(0, 2))
    return max(1, int((by_place > _small(case)).int().argmax()))


def _pattern(case: Case) -> str:
    """What the difference looks like, where no hypothesis explains it."""
    kind, small = case.stage.kind, _small(case)
    mine, theirs = (t.double().flatten(0, -2) for t in (case.mine, case.theirs))
    difference = (mine - theirs).abs()
    if float(difference.max()) <= 3 * small:
        return "no hypothesis fits, and the difference is hardly more than rounding"
    whole = float((mine * theirs).sum() / theirs.square().sum())
    if float((mine - whole * theirs).abs().max()) <= small:
        return f"ours is {whole:.4g} times theirs: a scale"
    if kind == "embedding":
        rows = case.x.broadcast_to(case.mine.shape[:-1]).flatten()
        odd, seen = rows[difference.amax(dim=-1) > small].unique(), rows.unique()
        if len(odd) <= 0.5 * len(seen):
            return f"{len(odd)} of the {len(seen)} rows that are used differ, the first is {int(odd[0])}: rows of the table"
    if kind == "heads":
        first = _first_place(case)
        where = f"it agrees before position {first}: " if first > 1 else ""
        return f"no hypothesis fits; {where}another rule of attention, such as positions, a mask or a window"
    odd = (difference.amax(dim=0) > small).nonzero().flatten()
    if isinstance(case.module, nn.Linear) and len(odd) <= 0.5 * difference.shape[1]:
        return f"{len(odd)} of {difference.shape[1]} channels differ, the first is {int(odd[0])}: rows of our matrix"
    if isinstance(case.module, nn.Linear) or kind == "embedding":
        return "no hypothesis fits: other weights"
    return "no hypothesis fits: other weights, or another formula"
