"""Work in processes: the order of the jobs, one thread each, and errors that arrive."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from common.foundation.parallel import each


def test_results_come_in_the_order_of_the_jobs_from_single_threads():
    assert each(pow, [{"base": 2, "exp": n} for n in range(7)], workers=2) == [1, 2, 4, 8, 16, 32, 64]
    assert each(torch.get_num_threads, [{}, {}], workers=2) == [1, 1]


def test_the_environment_of_the_caller_is_as_it_was(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    each(abs_of, [{"x": 1}], workers=1)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_an_error_arrives_and_the_next_call_works():
    with pytest.raises(ZeroDivisionError):
        each(fail, [{}], workers=2)
    assert each(abs_of, [{"x": -3}], workers=2) == [3]


WORKING = """
from common.foundation.parallel import each
import time
if __name__ == "__main__":
    each(time.sleep, [], workers=1)  # starts the worker
    each(print, [{"end": "", "flush": True}], workers=1)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_workers_leave_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "working.py"
    script.write_text(WORKING)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert "ready" in parent.stdout.readline()
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert workers
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.time() + 300
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in workers):
        assert time.time() < deadline
        time.sleep(0.1)


def fail():
    return 1 / 0


def abs_of(x):
    return abs(x)
