"""Replacing the linear modules of a model, in one place: low-rank adapters, pre-packed weights, int8 weights.

The rule that makes transformations compose: an adapter *wraps* a linear module and calls it (`.base`, and `.a` and `.b` of
its own). It does not subclass `nn.Linear`, and it does not read the weight of the module that it wraps. Then the module
inside can be replaced as well, and nothing that the adapter adds is lost. A subclass with parameters of its own looks like
a plain linear module to any code that asks `isinstance(module, nn.Linear)`; such code takes the weight and drops the rest
without a word (gallery: baselines/adapter-dropped). `replace_linears` refuses it instead.
"""

from collections import Counter
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


def replace_linears(
    model: nn.Module,
    make: Callable[[str, nn.Linear], nn.Module],
    where: Callable[[str, nn.Module], bool] = lambda name, module: True,
    *,
    tied: Literal["refuse", "replace", "keep"] = "refuse",
) -> list[str]:
    """Put `make(name, linear)` in the place of every chosen linear module, and return the names of those places.

    Only modules whose type is exactly `nn.Linear` are replaced. All new modules are made before the first one is put in
    place, so an error leaves the model as it was. A module that stands in two places is made once and stays shared.

    Args:
        model: changed in place. It must contain the linear modules, and not be one itself.
        make: may keep the linear module inside the new one, or only its numbers.
        where: chooses by the full name ("blocks.0.attention.query") and the module; everything by default.
        tied: what to do with a chosen module whose weight is also a parameter of another module, such as a head that shares
            the embedding. "replace" hands it to `make` as well. That is right for a wrapper that keeps the module, and for
            inference; a new weight no longer follows the embedding when either is trained. "keep" leaves it alone.
    Raises:
        ValueError: `where` chooses a subclass of `nn.Linear` with parameters or modules of its own, or a tied module while
            `tied` is "refuse". The message names the module and the remedy.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    modules = dict(model.named_modules(remove_duplicate=False))  # each place of a module that stands in several
    chosen = []
    for name, child in modules.items():
        if not name or not isinstance(child, nn.Linear) or not where(name, child):
            continue
        if type(child) is not nn.Linear:
            _refuse_more_than_linear(name, child)
            continue  # for example a fake-quantised one: it has no parameters of its own, and other arithmetic
        if owners[id(child.weight)] > 1:
            if tied == "refuse":
                raise ValueError(
                    f"{name} shares its weight with another module (a tied head?): tied='keep' leaves it as it is; "
                    "tied='replace' replaces it, and a new weight then no longer follows the other one"
                )
            if tied == "keep":
                continue
        chosen.append((name, child))
    made: dict[int, nn.Module] = {}
    for name, child in chosen:
        if id(child) not in made:
            made[id(child)] = make(name, child)
    for name, child in chosen:
        path, _, attribute = name.rpartition(".")
        setattr(modules[path], attribute, made[id(child)])
    return [name for name, _ in chosen]


def _refuse_more_than_linear(name: str, module: nn.Linear) -> None:
    own = sorted({n for n, _ in module.named_parameters()} | {n for n, _ in module.named_children()})
    own = [n for n in own if n not in ("weight", "bias")]
    if own:
        raise ValueError(
            f"{name} is a {type(module).__name__}, a subclass of nn.Linear with {', '.join(own)} of its own: replacing it "
            "would drop them. Let the adapter wrap the linear module (as `.base`) instead of subclassing it, or merge it "
            "into the weight first, or leave the module out by `where`."
        )


def weight_of(linear: nn.Module, example: Float[Tensor, "... I"]) -> Float[Tensor, "O I"]:
    """The matrix by which a linear module without bias multiplies, also where the module has been replaced or wrapped.

    A plain module has it as `weight`. Any other is asked: it multiplies the identity, which costs a product of I rows, and
    lets gradients reach whatever the module consists of. `example` is any input of the module: its width, format and
    device count.
    """
    if type(linear) is nn.Linear:
        return linear.weight
    return linear(torch.eye(example.shape[-1], dtype=example.dtype, device=example.device)).mT
