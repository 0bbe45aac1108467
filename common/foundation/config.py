"""Configs: frozen dataclasses with one dial, `size`.

A field that is None means "derive it from the size". `resolve` fills those in, so that the manifest holds the numbers
that were used and the reader can override any one of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from common.foundation.files import sha256_json

Config = TypeVar("Config")
SIZES = ("tiny", "small", "medium", "large")


def resolve(config: Config, sizes: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return `config` with every None replaced by the value that its `size` implies.

    Args:
        config: a dataclass with a `size` field.
        sizes: size -> {field: value}. Every field that may be None must be in every size.
    Raises:
        ValueError: an unknown size, or a field left without a value.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Demo:
    ...     size: str = "tiny"
    ...     order: int | None = None
    >>> resolve(Demo(), {"tiny": {"order": 3}})
    Demo(size='tiny', order=3)
    >>> resolve(Demo(order=5), {"tiny": {"order": 3}})
    Demo(size='tiny', order=5)
    """
    if config.size not in sizes:
        raise ValueError(f"size {config.size!r} is unknown; choose one of {', '.join(sizes)}")
    derived = sizes[config.size]
    unknown = set(derived) - {field.name for field in dataclasses.fields(config)}
    if unknown:
        raise ValueError(f"sizes[{config.size!r}] sets {sorted(unknown)}, which {type(config).__name__} does not have")
    filled = {name: value for name, value in derived.items() if getattr(config, name) is None}
    resolved = dataclasses.replace(config, **filled)
    missing = [field.name for field in dataclasses.fields(resolved) if getattr(resolved, field.name) is None]
    if missing:
        raise ValueError(f"{type(config).__name__}: size {config.size!r} gives no value for {missing}")
    return resolved


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists, as they will when it is read back)."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }


def config_hash(config: Any) -> str:
    """Eight hexadecimal digits that name this config, independent of the order of its fields."""
    return sha256_json(as_dict(config))[:8]
