"""What code produced a number: the hash of a script and of every module of `common` that it imports, directly or not.

Comments, docstrings and layout do not count, so that explaining a result better does not invalidate it.
"""

import ast
import functools
import subprocess
from pathlib import Path

from common.foundation.files import sha256_json
from common.foundation.months import ROOT


@functools.cache
def _parse(path: Path) -> tuple[str, frozenset[str]]:
    """(hash of the code without comments and docstrings, names of the `common` modules it imports)."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from common.model import ngram` may name a module or an object of the package: ask the disk.
            imported.add(node.module)
            imported.update(f"{node.module}.{alias.name}" for alias in node.names)
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    modules = frozenset(name for name in imported if name.split(".")[0] == "common")
    return sha256_json(_shape(tree)), modules


def _shape(node: object) -> object:
    """A syntax tree as plain values. Empty fields are left out: which ones exist depends on the version of Python."""
    if isinstance(node, ast.AST):
        fields = {
            name: _shape(value) for name, value in ast.iter_fields(node) if value not in (None, []) and name != "kind"
        }
        return [type(node).__name__, fields]
    return [_shape(item) for item in node] if isinstance(node, list) else repr(node)


def _module_path(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path
    return None


def code_hashes(script: str | Path) -> dict[str, str]:
    """Map `script` and every module of `common` that it reaches to a hash of its code.

    Imports inside functions count as well: what can be called can change the result.
    """
    script = Path(script).resolve()
    hashes, waiting = {}, []

    def visit(label: str, path: Path) -> None:
        digest, modules = _parse(path)
        hashes[label] = digest
        waiting.extend(modules)

    visit(script.name, script)
    while waiting:
        name = waiting.pop()
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # importing a module runs its packages' __init__ as well
        path = _module_path(name)
        if path is not None and name not in hashes:
            visit(name, path)
    return dict(sorted(hashes.items()))


def git_state() -> dict[str, object]:
    """{"commit": hash or None, "dirty": bool or None}. None where this is no checkout or git is missing."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
