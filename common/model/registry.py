"""Which class a saved model belongs to: each model class registers a short name, its *kind*, and describes itself.

A checkpoint holds what `model.describe()` returned, plain values with the kind among them. To load it, the class is looked
up here and `from_description` makes an empty model of that shape. A new kind of model therefore needs no change in the
code that saves and loads. What a file says can only choose among the registered classes: no name from a file is ever
imported.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import common.model


class Describable(Protocol):
    """What a class must offer to be saved by name. Decorate it with `@registered("its kind")`."""

    def describe(self) -> dict[str, Any]:
        """Everything but the tensors that is needed to make this model again, as JSON values; "kind" is the name."""
        ...

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> Self:
        """A model of that shape. Its tensors are initial ones, and will be overwritten."""
        ...


_CLASSES: dict[str, type] = {}


def registered(kind: str) -> Callable[[type], type]:
    """Class decorator: make a class known under this name. Raises ValueError if another class has the name."""

    def add(cls: type) -> type:
        known = _CLASSES.setdefault(kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"two classes are registered as {kind!r}: {known.__qualname__} and {cls.__qualname__}")
        _CLASSES[kind] = cls  # a module that is loaded again (in a notebook) brings a new class object of the same name
        return cls

    return add


def model_kinds() -> dict[str, type]:
    """Kind to class, of all models in this folder."""
    # A class registers itself when its module is imported, and whoever loads a checkpoint need not have imported it. The
    # modules that are imported here are those of our own folder, whatever the file says.
    for module in pkgutil.iter_modules(common.model.__path__):
        importlib.import_module(f"common.model.{module.name}")
    return dict(sorted(_CLASSES.items()))


def model_class(kind: str) -> type | None:
    """The class that is registered under this name; None where there is none."""
    return _CLASSES.get(kind) or model_kinds().get(kind)
