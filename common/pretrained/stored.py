"""Tensors of other people's files, each read when it is asked for: safetensors in a folder, and GGUF.

Names, shapes and formats come from the headers, so that they can be compared with a config before anything is read.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from common.foundation.files import read_json
from common.foundation.gguf_file import MOST_DIMENSIONS, GGUFFile

NUMBER_FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
INDEX = "model.safetensors.index.json"
EXPERT = re.compile(r"(.*layers\.\d+)\.block_sparse_moe\.experts\.([0-9]{1,6})\.(w1|w2|w3)\.weight")


class Shards(Mapping[str, Tensor]):
    """The tensors of the safetensors files of a folder, each read when it is asked for.

    Mixtral's experts, each a tensor in the files, are one tensor for all experts of a layer, as transformers has them.

    Attributes:
        shapes, formats: of all of them, from the headers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.shapes, self._file = folder, {}, {}
        self.formats: dict[str, str] = {}
        listed = _weight_map(folder)
        for path in _weight_files(folder, listed):
            try:
                with safetensors.safe_open(path, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118, it is no mapping
                        if name in self.shapes:
                            raise ValueError(f"{path}: {name} is in {self._file[name].name} as well")
                        part = opened.get_slice(name)
                        shape = tuple(part.get_shape())
                        if len(shape) > MOST_DIMENSIONS or 0 in shape:
                            raise ValueError(f"{path}: {name} has the shape {reprlib.repr(shape)}")
                        self.shapes[name], self._file[name] = shape, path
                        self.formats[name] = part.get_dtype()
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read as safetensors: {error}. Fetch it again.") from error
        if odd := sorted(set(listed or self.shapes) ^ set(self.shapes)):
            raise ValueError(
                f"{folder / INDEX} and the files beside it disagree about {len(odd)} tensors, such as {odd[0]}"
            )
        self._parts: dict[str, list[str]] = {}
        self._stack_experts()

    def _stack_experts(self) -> None:
        """Raises ValueError where a part is missing. Parts of different shapes are left as they are, to be named."""
        found: dict[str, dict[tuple[int, str], str]] = {}
        for name in self.shapes:
            if match := EXPERT.fullmatch(name):
                found.setdefault(match[1], {})[int(match[2]), match[3]] = name
        for layer, names in found.items():
            count, router = 1 + max(e for e, _ in names), f"{layer}.block_sparse_moe.gate.weight"
            gone = ((e, kind) for e in range(count) for kind in ("w1", "w2", "w3") if (e, kind) not in names)
            for e, kind in gone:
                raise ValueError(f"{self.folder} has no {layer}.block_sparse_moe.experts.{e}.{kind}.weight")
            made = {
                f"{layer}.mlp.experts.gate_up_proj": [(e, kind) for e in range(count) for kind in ("w1", "w3")],
                f"{layer}.mlp.experts.down_proj": [(e, "w2") for e in range(count)],
            }
            for stack, places in made.items():
                parts = [names[place] for place in places]
                shapes = {self.shapes[part] for part in parts}
                if len(shapes) == 1 and len(shape := shapes.pop()) == 2 and stack not in self.shapes:
                    self._join(stack, parts, (count, len(parts) // count * shape[0], shape[1]))
            if router in self.shapes and f"{layer}.mlp.gate.weight" not in self.shapes:
                self._join(f"{layer}.mlp.gate.weight", [router], self.shapes[router])

    def _join(self, name: str, parts: list[str], shape: tuple[int, ...]) -> None:
        self._parts[name], self.shapes[name], self.formats[name] = parts, shape, self.formats[parts[0]]
        for part in parts:
            del self.shapes[part]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._read(name)
        parts, dtype = self._parts[name], NUMBER_FORMATS[self.formats[name]]
        made = torch.empty(self.shapes[name], dtype=dtype)
        for place, part in zip(made.view(len(parts), -1), parts, strict=True):
            place.copy_(self._read(part).flatten())
        return made

    def _read(self, name: str) -> Tensor:
        """Opened anew each time: what has been read of a mapped file would stay in memory until it is closed."""
        with safetensors.safe_open(self._file[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file, of a folder with an index."""
    if not (folder / INDEX).exists():
        return None
    found = json_object(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names {name!r}: only safetensors files beside it are read")
    return found


def _weight_files(folder: Path, listed: dict[str, str] | None) -> list[Path]:
    paths = [folder / name for name in sorted(set(listed.values()))] if listed else [folder / "model.safetensors"]
    for path in paths:
        if not path.exists() and listed:
            raise FileNotFoundError(f"{path} is missing, which {INDEX} names. Fetch the folder again.")
    if paths[0].exists():
        return paths
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    danger = "a pickle, which may run any code when it is read. Convert it where you trust it"
    raise FileNotFoundError(f"{folder} has no model.safetensors{f': it has {pickles[0]}, {danger}' if pickles else ''}")


def json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: is it a folder with a model?")
    try:
        found = read_json(path)
    except (ValueError, RecursionError) as error:  # syntax, encoding, numbers of 5,000 digits, brackets without end
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found


class Dequantised(Mapping[str, Tensor]):
    """The tensors of a GGUF file, each computed when it is asked for."""

    def __init__(self, file: GGUFFile) -> None:
        self._of, self.shapes = file, {name: stored.shape for name, stored in file.tensors.items()}
        self.formats = dict.fromkeys(self.shapes, "F32")

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._of.array(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
