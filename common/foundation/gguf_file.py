"""A GGUF file, read by somebody who does not believe it.

The format (llama.cpp's): magic, version, two counts, metadata as typed key-value pairs, a table of tensors, then their data.
Every length and offset is checked against the size of the file before it is used, so that a file that lies cannot make us
allocate, loop or read what is not there; the reader of the `gguf` package takes them on trust. The hard part stays with that
package: sizes and formulas of the quantised formats.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
LEAST = {**{kind: struct.calcsize(form) for kind, form in SCALARS.items()}, STRING: 8}  # bytes of the smallest value
MOST_DIMENSIONS = 4
MOST_VALUES = 1 << 24  # in all arrays together; the vocabularies of today have a quarter of a million tokens
PIECE = 1 << 20  # bytes of float32 that are made at a time


@dataclass(frozen=True)
class Stored:
    """One tensor of the table. `shape` in the order of torch; `start` counts from the beginning of the file."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """Metadata and tensors of a GGUF file, little-endian, version 2 or 3.

    Attributes:
        metadata: keys and plain Python values.
        tensors: the table, by name.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not GGUF, is cut off, or contradicts itself. Nothing of it has been used then.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        if self.path.stat().st_size < 24:
            raise ValueError(f"{self.path} is not a GGUF file: it has {self.path.stat().st_size} bytes")
        self._data = memoryview(np.memmap(self.path, mode="r"))  # for the header; tensors are read where they are
        self._at, self._values = 0, 0
        try:
            self._read_header()
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} cannot be read as GGUF: {error}. Fetch it again.") from error

    def array(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantised where it is quantised. Raises ValueError for a format that cannot be.

        It is read and computed in pieces: beside the result hardly anything is held, and nothing stays mapped.
        """
        stored = self.tensors[name]
        block, size = gguf.GGML_QUANT_SIZES[stored.kind]
        width = stored.shape[-1]
        made = np.empty(stored.shape, dtype=np.float32)
        rows, row_bytes, step = made.reshape(-1, width), width // block * size, max(1, PIECE // (4 * width))
        try:
            with self.path.open("rb") as file, np.errstate(all="ignore"):  # scales that are NaN: seen in the result
                file.seek(stored.start)
                for first in range(0, len(rows), step):
                    piece = rows[first : first + step]
                    raw = np.fromfile(file, dtype=np.uint8, count=len(piece) * row_bytes)
                    if raw.size < len(piece) * row_bytes:
                        raise ValueError(f"{self.path} ended within {name}: it has become shorter")
                    piece[:] = gguf.dequantize(raw.reshape(len(piece), row_bytes), stored.kind)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: {name} is stored as {stored.kind.name}, which cannot be read") from error
        return made

    def _read_header(self) -> None:
        if bytes(self._take(4)) != MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        version = self._scalar("<I")
        if int.from_bytes(struct.pack(">I", version), "little") in VERSIONS:
            raise ValueError("it is big-endian")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; versions {VERSIONS} are known")
        tensors, pairs = self._count(8 + 4 + 8 + 4 + 8, "tensors"), self._count(8 + 4 + 1, "metadata entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            if key in self.metadata:
                raise ValueError(f"the key {key!r} occurs twice")
            self.metadata[key] = self._value(self._scalar("<I"), key)
        table = [self._table_row() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
        first = -(-self._at // alignment) * alignment
        self.tensors: dict[str, Stored] = {}
        for name, kind, shape, offset in table:
            if name in self.tensors:
                raise ValueError(f"the tensor {name!r} occurs twice")
            if offset % alignment:
                raise ValueError(f"{name} begins at {offset:,}, which is no multiple of the alignment {alignment:,}")
            self.tensors[name] = self._placed(name, kind, shape, first + offset)
        self._check_overlap()

    def _placed(self, name: str, kind: int, shape: tuple[int, ...], start: int) -> Stored:
        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"{name} is stored in the unknown format {kind}") from None
        block, size = gguf.GGML_QUANT_SIZES[known]
        elements = 1
        for dimension in shape:  # Python integers: nothing wraps around
            elements *= dimension
        if shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]}, not a multiple of the {block} of {known.name}")
        nbytes = elements // block * size
        if start + nbytes > len(self._data):
            raise ValueError(
                f"{name} {shape} as {known.name} ends at byte {start + nbytes:,}, the file at {len(self._data):,}"
            )
        return Stored(known, shape, start, nbytes)

    def _check_overlap(self) -> None:
        end, before = 0, ""
        for name, stored in sorted(self.tensors.items(), key=lambda item: item[1].start):
            if stored.start < end:
                raise ValueError(f"{before} and {name} share bytes")
            end, before = stored.start + stored.nbytes, name

    def _table_row(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self._string(), self._scalar("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions, not 1 to {MOST_DIMENSIONS}")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))[::-1]
        if not all(shape):
            raise ValueError(f"{name} is empty: {shape}")
        return name, self._scalar("<I"), shape, self._scalar("<Q")

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"{key} has the unknown type {kind}")
        inner = self._scalar("<I")
        if inner not in LEAST:
            raise ValueError(f"{key} is an array of the unknown type {inner}")
        count = self._count(LEAST[inner], f"values of {key}")
        self._values += count
        if self._values > MOST_VALUES:
            raise ValueError(f"its arrays, up to {key}, have {self._values:,} values; {MOST_VALUES:,} are read")
        if inner == STRING:
            return [self._string() for _ in range(count)]
        return np.frombuffer(self._take(count * LEAST[inner]), dtype=SCALARS[inner]).tolist()

    def _count(self, least: int, what: str) -> int:
        """A count of things that take at least so many bytes each: more than could follow is a lie."""
        count = self._scalar("<Q")
        if count * least > len(self._data) - self._at:
            raise ValueError(f"it announces {count:,} {what}, for which it has no room")
        return count

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return float(str(np.float32(value))) if form == "<f" else value  # 1e-05, not 9.999999747378752e-06

    def _string(self) -> str:
        return bytes(self._take(self._scalar("<Q"))).decode("utf-8")

    def _take(self, count: int) -> memoryview:
        end = self._at + count
        if end > len(self._data):
            raise ValueError(f"{count:,} bytes are wanted at byte {self._at:,}, the file ends at {len(self._data):,}")
        taken, self._at = self._data[self._at : end], end
        return taken
