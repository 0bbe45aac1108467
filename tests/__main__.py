"""`python -m tests`: every check of the project, in the order in which they fail fastest.

`python -m tests notebooks` executes every notebook again, in place, in a clean kernel, or those that are named after it.
`python -m tests anywhere` repeats what numbers decide under settings that stand in for other processors.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("[01]*/*.ipynb"))
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval.cfg", "--dist", "loadscope"]
NBVAL += ["-p", "tests.notebook_numbers"]  # numbers that a training decides, within what their cell states
NBVAL += ["--nbval-kernel-startup-timeout", "900", "--nbval-cell-timeout", "7200"]  # a busy machine is slow, not wrong

# Settings that make this machine compute as another one. The first leaves the instructions alone and takes other kernels for
# products of matrices; the second does without vectors of more than four numbers, where torch and oneDNN have the choice.
PROCESSORS = {
    "another library of matrix products": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "COMPATIBLE",
    },
    "an old processor": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def workers() -> str:
    return str(min(4, os.cpu_count() or 1))


def passes(what: str, *command: str, setting: Mapping[str, str] = MappingProxyType({})) -> bool:
    """Run one check, in an environment with `setting` added; say what came of it."""
    print(f"== {what}", flush=True)
    # One thread a worker: the workers share the cores, and sums over threads round differently.
    quiet = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "MPLBACKEND": "agg"}
    start = time.perf_counter()
    environment = {**os.environ, **quiet, **setting}
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment).returncode
    print(f"   {'ok' if code == 0 else 'FAILED'} in {time.perf_counter() - start:.0f} s", flush=True)
    return code == 0


def run(what: str, *command: str) -> None:
    """Run one check; stop everything if it fails."""
    if not passes(what, *command):
        sys.exit(f"{what} failed")


def executing(paths: Sequence[str]) -> list[str]:
    """The command that executes notebooks in place. What a cell states about its numbers stays in its metadata."""
    return [
        *["jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--log-level", "WARN"],
        *["--ClearMetadataPreprocessor.enabled=True", "--ClearMetadataPreprocessor.clear_notebook_metadata=False"],
        "--ClearMetadataPreprocessor.preserve_cell_metadata_mask=numbers",
        *["--ExecutePreprocessor.record_timing=False", *paths],
    ]


def notebooks(paths: Sequence[str]) -> None:
    """Execute in place. Outputs are what readers see and what the tests compare."""
    run("texts and vocabularies", "common", "assets", "--all")
    run(f"executing {', '.join(paths)}", *executing(paths))


def base_training(setting: Mapping[str, str]) -> bool:
    """Train the base model once more, and hold its numbers against the spread of the committed trainings."""
    return passes("base model", "common", "trainings", "--check", setting=setting)


def anywhere() -> None:
    """Everything that numbers decide, under each setting, to the end; then what passed, and what did not."""
    run("texts and vocabularies", "common", "assets", "--all")
    verdicts = []
    for name, setting in PROCESSORS.items():
        print(f"\n==== {name}: {' '.join(f'{key}={value}' for key, value in setting.items())}", flush=True)
        checks = {
            "notebooks": ["pytest", "-n", workers(), *NBVAL, *NOTEBOOKS],
            "tables of the articles": ["pytest", "-n", workers(), "tests/months", "-k", "readmes or the_article"],
            "failure gallery": ["common", "gallery", "--check"],
        }
        verdicts += [(what, name, passes(what, *command, setting=setting)) for what, command in checks.items()]
        verdicts.append(("base model", name, base_training(setting)))
    print()
    for what, name, passed in verdicts:
        print(f"{'ok    ' if passed else 'FAILED'}  {what}: {name}")
    if not all(passed for *_, passed in verdicts):
        sys.exit("not everything passes on another processor")
    print("all checks passed under all settings")


def everything() -> None:
    # Fetched first, so that no test and no notebook waits for the network or prints about it.
    run("texts and vocabularies", "common", "assets", "--all")
    run("style", "ruff", "check", ".")
    run("format", "ruff", "format", "--check", "--quiet", ".")
    # The console script of import-linter has no module form; its entry point is called directly.
    run("import rules", "tests.imports")
    run("tests, documented examples, links", "pytest", "-n", workers(), "tests", "--doctest-modules", "common")
    run("notebooks", "pytest", "-n", workers(), *NBVAL, *NOTEBOOKS)
    run("failure gallery", "common", "gallery", "--check")
    print("all checks passed")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["notebooks", *paths]:
            notebooks(paths or NOTEBOOKS)
        case ["anywhere"]:
            anywhere()
        case []:
            everything()
        case _:
            sys.exit(__doc__)
