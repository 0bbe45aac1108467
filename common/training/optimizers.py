"""AdamW and Muon from their papers, and the rule that assigns each parameter to one of them.

    AdamW  divides each coordinate by the size it usually has      (Kingma and Ba 2014; Loshchilov and Hutter 2017)
    Muon   makes all directions of a matrix equally long           (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)

Muon is for the hidden matrices only: an embedding is a table whose rows rarely get a gradient, not a map between spaces, and
a norm's weight is no matrix at all. The bookkeeping is that of `torch.optim.Optimizer`; the arithmetic is here. Tests hold
AdamW equal to torch's fused step, and Muon equal to torch's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.foundation.device import pick_device
from common.training.distributed import gathered, inner


class AdamW(torch.optim.Optimizer):
    """p <- p - lr * (m / (sqrt(v) + eps) + weight_decay * p), with m and v corrected for their start at zero.

    The decay is not part of the gradient, so the division by sqrt(v) does not undo it; this is what the W stands for. State
    and arithmetic are fp32, whatever the format of the parameter.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "steps": 0})
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {name: torch.zeros_like(p, dtype=torch.float32) for name in ("first", "second")}

    @torch.no_grad()
    def step(self) -> None:
        """Make one update; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            group["steps"] += 1
            (b1, b2), rate, done = group["betas"], group["lr"], group["steps"]
            unbias_first, unbias_second = 1 - b1**done, math.sqrt(1 - b2**done)
            for p in group["params"]:
                if p.grad is None:
                    continue
                m, v, g = self.state[p]["first"], self.state[p]["second"], p.grad.float()
                m.lerp_(g, 1 - b1)  # m = b1 m + (1 - b1) g
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                size = (v.sqrt() / unbias_second).add_(group["eps"])
                p.mul_(1 - rate * group["weight_decay"])
                p.addcdiv_(m, size, value=-rate / unbias_first)


# Coefficients of Jordan's quintic: after five rounds singular values from about 0.002 to 1 lie between 0.7 and 1.2. Smaller
# ones have grown by 3.4 a round and are still small.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalised(
    matrices: Float[Tensor, "N R C"], *, rounds: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "N R C"]:
    """Each matrix with its singular values moved near 1 and its singular vectors kept: U S V^T becomes about U V^T.

    This is the Newton-Schulz iteration: x -> a x + (b s + c s^2) x with s = x x^T changes the singular values alone, by an
    odd polynomial. They end between about 0.7 and 1.2, which is as good as 1 here, and no decomposition is needed.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if tall else x  # x x^T is the smaller of the two squares
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(rounds):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """p <- p - lr * 0.2 sqrt(max(R, C)) * orthogonalised(momentum), decay as in AdamW.

    The factor gives an update the root mean square that AdamW's usually has, so that one learning rate serves both (Liu et
    al. 2025, "Muon is scalable for LLM training", section 2.2). Matrices of one shape are handled in one batched product.

    Args:
        parameters: matrices, or stacks of matrices (the last two dimensions count).
        dtype: the format of the iteration. bf16 is precise enough; take fp32 where bf16 is not faster.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": 0})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon is for matrices, got a parameter of shape {tuple(p.shape)}: use AdamW")
                self.state[p] = {"momentum": torch.zeros_like(p, dtype=torch.float32)}

    @torch.no_grad()
    def step(self) -> None:
        """Make one update; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            group["steps"] += 1
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, same in shapes.items():
                wanted = [self._direction(p, group["momentum"]) for p in same]
                whole = torch.stack([gathered(x) for x in wanted])
                made = orthogonalised(whole.flatten(0, -3), dtype=self.dtype).view_as(whole)
                size = group["lr"] * 0.2 * math.sqrt(max(shape[-2:]))
                for p, update in zip(same, made, strict=True):
                    if hasattr(p, "placements"):  # sharded: back to the layout of the parameter
                        from torch.distributed.tensor import distribute_tensor

                        update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-size)

    def _direction(self, p: nn.Parameter, momentum: float) -> Tensor:
        """The gradient with Nesterov momentum."""
        g = p.grad.float()
        m = self.state[p]["momentum"].lerp_(g, 1 - momentum)
        return g.lerp(m, momentum)


Kind = Literal["hidden", "table", "plain"]


def kind_of(name: str, parameter: Tensor) -> Kind:
    """The role of a parameter, which decides its optimizer and its decay.

    "hidden": a matrix between two spaces of the model. "table": embeddings, head and router, whose rows belong to tokens or
    experts. "plain": weights of norms and biases, which are never decayed (gallery: pretraining/decayed-norms).
    """
    if parameter.ndim < 2:
        return "plain"
    tables = ("embedding", "position_table", "head", "router")
    return "table" if any(part in tables for part in name.split(".")) else "hidden"


def groups_of(model: nn.Module) -> dict[Kind, dict[str, nn.Parameter]]:
    """Sort every parameter that is trained into one group (a tied one counts once): kind -> name -> parameter."""
    groups: dict[Kind, dict[str, nn.Parameter]] = {"hidden": {}, "table": {}, "plain": {}}
    for name, parameter in inner(model).named_parameters():  # each tensor once, under its first name
        if parameter.requires_grad:
            groups[kind_of(name, parameter)][name] = parameter
    return groups


class Optimizers:
    """All optimizers of one model behind one step, one rate, and a state in which tensors have the names of parameters.

    Args:
        parts: optimizers that share no parameter.
        names: the model's name for each parameter.
    Raises:
        ValueError: a parameter is in two groups or in none.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], names: dict[str, nn.Parameter]) -> None:
        self.parts, self.names = list(parts), names
        self.groups = [group for part in self.parts for group in part.param_groups]
        held = [id(p) for group in self.groups for p in group["params"]]
        wanted = {id(p): name for name, p in names.items()}
        if sorted(held) != sorted(wanted):
            left_out = [name for i, name in wanted.items() if i not in held]
            raise ValueError(
                f"{len(wanted)} parameters, {len(held)} places in groups; each must be in exactly one. "
                f"Left out: {', '.join(left_out) or 'none'}"
            )
        for group in self.groups:
            group["top"] = group["lr"]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def set_rate(self, factor: float) -> None:
        """Each group's learning rate is its own top rate times `factor`, a value of the schedule."""
        for group in self.groups:
            group["lr"] = group["top"] * factor

    def state_tensors(self) -> dict[str, Tensor]:
        """ "<parameter>/<what>" -> tensor. These are the state itself, not copies."""
        states = {id(p): state for part in self.parts for p, state in part.state.items()}
        return {f"{name}/{key}": tensor for name, p in self.names.items() for key, tensor in states[id(p)].items()}

    def counters(self) -> list[int]:
        """The number of updates of each group, which AdamW needs to correct its moments for their start at zero."""
        return [group["steps"] for group in self.groups]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of `state_tensors`. Raises ValueError if they belong to another model or optimizer."""
        mine = self.state_tensors()
        wrong = sorted(set(mine) ^ set(tensors)) or [n for n in mine if mine[n].shape != tensors[n].shape]
        if wrong:
            here, there = (f"{tuple(x[wrong[0]].shape)}" if wrong[0] in x else "nothing" for x in (mine, tensors))
            raise ValueError(
                f"optimizer state does not fit, {len(wrong)} tensors: for {wrong[0]} the optimizer here has {here}, the "
                f"file {there}. Resume with the model and optimizer that were saved."
            )
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])

    def load_counters(self, counters: Sequence[int]) -> None:
        """Take over `counters`."""
        for group, steps in zip(self.groups, counters, strict=True):
            group["steps"] = steps


def make_optimizers(
    model: nn.Module,
    kind: Literal["adamw", "muon"] = "muon",
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    muon_dtype: torch.dtype | None = None,
) -> Optimizers:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    Args:
        learning_rate: the rate of all groups at the top of the schedule.
        weight_decay: the decay of hidden matrices and tables; norms and biases have none.
        muon_dtype: the format of Muon's iteration; None is bf16 where this machine is faster in it.
    """
    if kind not in ("adamw", "muon"):
        raise ValueError(f"optimizer {kind!r} is unknown; there are adamw, muon")
    groups = groups_of(model)
    decays = {"hidden": weight_decay, "table": weight_decay, "plain": 0.0}
    by_adam = [k for k in groups if groups[k] and (kind == "adamw" or k != "hidden")]
    parts: list[torch.optim.Optimizer] = []
    if by_adam:
        rows = [{"params": list(groups[k].values()), "weight_decay": decays[k]} for k in by_adam]
        parts.append(AdamW(rows, lr=learning_rate, betas=betas))
    if kind == "muon" and groups["hidden"]:
        dtype = muon_dtype or pick_device().dtype
        hidden = list(groups["hidden"].values())
        parts.append(Muon(hidden, lr=learning_rate, weight_decay=weight_decay, dtype=dtype))
    return Optimizers(parts, {name: p for group in groups.values() for name, p in group.items()})
