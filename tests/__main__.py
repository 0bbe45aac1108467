"""`python -m tests`: every check of the project, in the order in which they fail fastest.

`python -m tests notebooks` executes every notebook again, in place, in a clean kernel.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("[01]*/*.ipynb"))
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval.cfg", "--dist", "loadscope"]
NBVAL += ["-p", "tests.notebook_numbers"]  # numbers that a training decides, within what their cell states


def workers() -> str:
    return str(min(4, os.cpu_count() or 1))


def run(what: str, *command: str) -> None:
    """Run one check; stop everything if it fails."""
    print(f"== {what}", flush=True)
    # One thread a worker: the workers share the cores, and sums over threads round differently.
    quiet = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "MPLBACKEND": "agg"}
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, **quiet}).returncode
    print(f"   {'ok' if code == 0 else 'FAILED'} in {time.perf_counter() - start:.0f} s", flush=True)
    if code:
        sys.exit(f"{what} failed")


def notebooks() -> None:
    """Execute in place. Outputs are what readers see and what the tests compare."""
    run("texts and vocabularies", "common", "assets", "--all")
    run(
        f"executing {', '.join(NOTEBOOKS)}",
        *["jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--log-level", "WARN"],
        *["--ClearMetadataPreprocessor.enabled=True", "--ClearMetadataPreprocessor.clear_notebook_metadata=False"],
        *["--ExecutePreprocessor.record_timing=False", *NOTEBOOKS],
    )


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
    notebooks() if sys.argv[1:] == ["notebooks"] else everything()
