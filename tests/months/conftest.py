"""One tiny year for all tests and all worker processes: the first that asks makes it, the others wait."""

import os
import subprocess
import sys

import filelock
import pytest

from common.foundation.months import ROOT


@pytest.fixture(scope="session")
def tiny_year(tmp_path_factory, worker_id):
    """The folder of runs, with May at size tiny in it and what it needs. Read it; write elsewhere."""
    base = tmp_path_factory.getbasetemp()
    runs = (base if worker_id == "master" else base.parent) / "tiny-year"
    with filelock.FileLock(f"{runs}.lock"):
        done = subprocess.run(
            [sys.executable, "-m", "common", "month", "5", "--size", "tiny"],
            env={**os.environ, "SPINE_RUNS": str(runs)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return runs
