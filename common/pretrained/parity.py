"""Parity: the same weights and inputs in our model and in somebody else's, stage by stage, and the first that differs.

Two runs. *As it runs* shows how far apart the two models are by each stage. *Forced* gives every stage of ours the
reference's own input, so that an error shows where it is made and nowhere else: a stage that differs there is wrong by
itself, and several wrong ones are all found at once. Hooks do both; neither model knows.

The reference is any module with the module names of a transformers model (GPT-2, Llama, Qwen3, Mistral, Mixtral).
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from common.model.config import ModelConfig
from common.model.transformer import Transformer
from common.pretrained.causes import likely_cause
from common.pretrained.names import HF_GPT2, Family, family_of, their_name
from common.training.loss import language_model_loss

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Stage:
    """A tensor that both models compute.

    Attributes:
        name: "layer 3, query".
        kind: "query"; what hypotheses about a difference depend on.
        ours, theirs: paths of modules.
        entry: the tensor is the input of that module, not its output.
        part: theirs is this one of so many along the last dimension (GPT-2's query, key and value).
        heads_first: ours is (B, H, T, D) where theirs is (B, T, H, D).
    """

    name: str
    kind: str
    ours: str
    theirs: str
    entry: bool = False
    part: tuple[int, int] | None = None
    heads_first: bool = False


@dataclass(frozen=True)
class Row:
    """max |ours - theirs| / max |theirs| of one stage: on the reference's input, and as the models run."""

    stage: Stage
    forced: float
    free: float


@dataclass(frozen=True)
class Parity:
    """What a comparison found.

    Attributes:
        rows: every stage in the order in which it is computed.
        tolerance: of `forced`.
        logits: max |ours - theirs| of the logits, as the models run.
        losses: nats per token of the inputs: ours, theirs.
        agreement: share of positions with the same most probable token.
        cause: what explains the first divergence, in words; empty where there is none.
    """

    rows: list[Row]
    tolerance: float
    logits: float
    losses: tuple[float, float]
    agreement: float
    cause: str = field(default="")

    @property
    def first(self) -> Row | None:
        """The first stage that differs on the reference's own input."""
        return next((row for row in self.rows if not row.forced <= self.tolerance), None)

    @property
    def wrong(self) -> list[str]:
        """Names of all such stages."""
        return [row.stage.name for row in self.rows if not row.forced <= self.tolerance]

    def __str__(self) -> str:
        lines = [f"{'stage':<24} {'forced':>9} {'as it runs':>11}   (relative to the largest number of the stage)"]
        worst: dict[str, Row] = {}
        for row in self.rows:  # one line for each kind of stage: the layer where it is worst
            if row.stage.kind not in worst or not row.forced <= worst[row.stage.kind].forced:
                worst[row.stage.kind] = row
        lines += [f"{row.stage.name:<24} {row.forced:>9.1e} {row.free:>11.1e}" for row in worst.values()]
        lines.append(f"logits differ by at most {self.logits:.2g}; loss {self.losses[0]:.6f} and {self.losses[1]:.6f} nats "
                     f"per token; same first choice at {self.agreement:.1%} of positions")  # fmt: skip
        if self.first is None:
            lines.append(f"parity: all {len(self.rows)} stages agree to {self.tolerance:.0e}")
        else:
            more = f", and {len(self.wrong) - 1} more stages differ by themselves" if len(self.wrong) > 1 else ""
            lines.append(f"first divergence: {self.first.stage.name} ({self.first.forced:.1e}){more}")
            lines.append(f"likely cause: {self.cause}")
        return "\n".join(lines)


@torch.no_grad()
def parity_report(
    ours: Transformer, theirs: nn.Module, ids: Int[Tensor, "B T"], *, tolerance: float | None = None
) -> Parity:
    """Compare two models on the same inputs.

    Args:
        theirs: called with `input_ids`, it returns an object with `.logits`.
        ids: at least two tokens a row; long rows show what short ones hide (a wrong base of rotary positions).
        tolerance: of the relative error of one stage; by the number format if not given.
    Raises:
        ValueError: a module of the reference is not where the family has it.
    """
    stages = stages_of(ours.config)
    tolerance = TOLERANCE[ours.embedding.weight.dtype] if tolerance is None else tolerance
    reference: dict[str, Tensor] = {}
    with _tapped(
        theirs, [(stage.theirs, stage) for stage in stages], lambda s, t, _: reference.update({s.name: _part(t, s)})
    ):
        their_logits = theirs(input_ids=ids).logits
    free: dict[str, float] = {}

    def compare(stage: Stage, tensor: Tensor, _: tuple) -> None:
        free[stage.name] = _error(_shaped(tensor, stage), reference[stage.name])

    with _tapped(ours, [(stage.ours, stage) for stage in stages], compare):
        our_logits = ours(ids).logits
    forced: dict[str, float] = {}
    kept: list[tuple[Stage, Tensor, tuple]] = []  # of the first that differs: for its cause

    def replace(stage: Stage, tensor: Tensor, inputs: tuple) -> Tensor:
        other = reference[stage.name]
        forced[stage.name] = _error(_shaped(tensor, stage), other)
        if not forced[stage.name] <= tolerance and not kept:
            kept.append((stage, _shaped(tensor, stage), inputs))
        if other.numel() != tensor.numel():  # nothing that could take its place
            return tensor
        return (other.transpose(1, 2) if stage.heads_first else other).reshape(tensor.shape).to(tensor.dtype)

    with _tapped(ours, [(stage.ours, stage) for stage in stages], replace):
        forced_logits = ours(ids).logits
    # What is done to logits after the head, such as bending them, is a stage without a module.
    stages.append(Stage("output", "output", "", ""))
    free["output"], reference["output"] = _error(our_logits, their_logits), their_logits
    replace(stages[-1], forced_logits, (reference["logits"],))
    rows = [Row(stage, forced[stage.name], free[stage.name]) for stage in stages if stage.name in free]
    targets, mask = ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool)
    losses = tuple(
        float(language_model_loss(logits[:, :-1], targets, mask).mean) for logits in (our_logits, their_logits)
    )
    cause = likely_cause(kept[0][0], ours, kept[0][1], reference, kept[0][2], tolerance) if kept else ""
    return Parity(
        rows, tolerance, float((our_logits - their_logits).abs().max()), losses,
        float((our_logits.argmax(-1) == their_logits.argmax(-1)).float().mean()), cause,
    )  # fmt: skip


def stages_of(config: ModelConfig) -> list[Stage]:
    """Every stage of a pre-norm model of this shape, in order."""
    family = family_of(config)
    found = [_stage("embedding", "embedding", "embedding", family)]
    if config.positions == "learned":
        found.append(_stage("positions", "embedding", "position_table", family))
    found.append(_stage("start of the stream", "stream", "blocks.0.attention_norm", family, entry=True))
    for i in range(config.layers):
        block = f"blocks.{i}"
        found.append(_stage(f"layer {i}, attention norm", "norm", f"{block}.attention_norm", family))
        for place, kind in enumerate(("query", "key", "value")):
            part = (place, 3) if family is HF_GPT2 else None
            found.append(_stage(f"layer {i}, {kind}", kind, f"{block}.attention.{kind}", family, part=part))
        for kind in ("query", "key") if config.qk_norm else ():
            found.append(
                _stage(f"layer {i}, {kind} norm", "norm", f"{block}.attention.{kind}_norm", family, heads_first=True)
            )
        found.append(_stage(f"layer {i}, heads", "heads", f"{block}.attention.output", family, entry=True))
        found.append(_stage(f"layer {i}, attention", "attention", f"{block}.attention.output", family))
        found.append(_stage(f"layer {i}, middle", "stream", f"{block}.mlp_norm", family, entry=True))
        found.append(_stage(f"layer {i}, MLP norm", "norm", f"{block}.mlp_norm", family))
        if not config.experts:
            found += [_stage(f"layer {i}, {kind}", kind, f"{block}.mlp.{kind}", family)
                      for kind in (("gate", "up") if config.gated else ("up",))]  # fmt: skip
            found.append(_stage(f"layer {i}, activation", "activation", f"{block}.mlp.down", family, entry=True))
        found.append(_stage(f"layer {i}, MLP", "MLP", f"{block}.mlp", family))
        found.append(_stage(f"layer {i}, stream", "stream", block, family))
    found.append(_stage("final norm", "norm", "final_norm", family))
    return [*found, _stage("logits", "logits", "head", family)]


def _stage(name: str, kind: str, ours: str, family: Family, **more: Any) -> Stage:
    if re.fullmatch(r"blocks\.\d+(\.mlp)?", ours):  # modules without weights of their own: above one that has
        below = their_name(f"{re.match(r'blocks.[0-9]+', ours)[0]}.attention_norm.weight", family).split(".")
        path = ".".join(below[:-2]) + (".mlp" if ours.endswith("mlp") else "")
    else:
        path = their_name(f"{ours}.weight", family).removesuffix(".weight")
    return Stage(name, kind, ours, path, **more)


@contextlib.contextmanager
def _tapped(
    model: nn.Module, places: list[tuple[str, Stage]], visit: Callable[[Stage, Tensor, tuple], Any]
) -> Iterator[None]:
    """While open, `visit(stage, tensor, inputs of the module)` sees each stage; a tensor that it returns takes its place."""
    modules, handles = dict(model.named_modules()), []

    def on_entry(stage: Stage) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> tuple | None:
            made = visit(stage, inputs[0], inputs)
            return (made, *inputs[1:]) if isinstance(made, Tensor) else None

        return hook

    def on_exit(stage: Stage) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            made = visit(stage, whole, inputs)
            if not isinstance(made, Tensor):
                return None
            return (made, *output[1:]) if isinstance(output, tuple) else made

        return hook

    try:
        for path, stage in places:
            if path not in modules:
                raise ValueError(f"the model has no module {path!r}, which {stage.name} is compared at")
            register = modules[path].register_forward_pre_hook if stage.entry else modules[path].register_forward_hook
            handles.append(register(on_entry(stage) if stage.entry else on_exit(stage)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _part(tensor: Tensor, stage: Stage) -> Tensor:
    return tensor if stage.part is None else tensor.chunk(stage.part[1], dim=-1)[stage.part[0]]


def _shaped(tensor: Tensor, stage: Stage) -> Tensor:
    return tensor.transpose(1, 2) if stage.heads_first else tensor


def _error(mine: Tensor, other: Tensor) -> float:
    """Infinite where shapes differ or one is not a number where the other is."""
    if mine.numel() != other.numel() or mine.shape[-1] != other.shape[-1]:
        return float("inf")
    mine, other = mine.double(), other.reshape(mine.shape).double()
    error = float((mine - other).abs().max() / other.abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")
