"""Files that are whole or absent: atomic writes, checked reads, append-only JSON lines.

A half-written file is the cheapest way to lose a run, and the easiest to mistake for a finished one. Files that are written
in one go use `atomic_path`, so that a reader sees the old file or the new one, never half of either; files that grow are
JSON lines, of which a kill can damage only the last.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is flushed to disk and moved over `path`.

    If the block raises, `path` is left as it was and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes the file private; a result should be as readable as any other file of this user.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces. What is hashed must not depend on the order of a dictionary."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError on NaN and infinity: they are not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ValueError that names the file and line when it is damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}). "
            "The file is damaged; delete it and make it again."
        ) from error


def append_json_line(path: str | Path, *values: Any) -> None:
    """Append one line for each value in a single write, so that a kill can damage only the last line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(canonical_json(value) + "\n" for value in values)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(text)


def read_json_lines(path: str | Path, *, repair: bool = False) -> list[Any]:
    """Read a JSON-lines file; a missing file is an empty list.

    A killed writer leaves at most one unfinished last line. With `repair=True` that line is cut off the file and the
    whole ones are returned; without, it raises, because a partial file must not be taken for a whole one. Damage
    anywhere else always raises ValueError with the line number.
    """
    path = Path(path)
    if not path.exists():
        return []
    raw = path.read_bytes()
    values, start = [], 0
    for number, line in enumerate(raw.splitlines(keepends=True), start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the last line has no end")
            values.append(json.loads(line))
        except ValueError as error:
            last = start + len(line) == len(raw)
            if not (last and repair):
                raise ValueError(
                    f"{path}, line {number}: {error}. The file was cut off or altered; "
                    "delete it, or resume the run that writes it."
                ) from error
            with atomic_path(path) as temporary:
                temporary.write_bytes(raw[:start])
        start += len(line)
    return values


def set_aside(path: str | Path) -> Path:
    """Rename a file or folder to the first free `<name>.1`, `<name>.2`, … so that nothing is overwritten."""
    path, number = Path(path), 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    os.replace(path, target)
    return target


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    return sha256_bytes(canonical_json(value).encode("utf-8"))


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
