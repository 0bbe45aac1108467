"""Many small trainings at once: one process for each core, one thread in each process.

A model of a hundred thousand parameters does not fill two threads, but two of them fill two cores. And a sum in one thread
has one order: results do not depend on how many cores there are.
"""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm import tqdm

from common.foundation.machine import count_workers, usable_cores

Result = TypeVar("Result")
QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # of the workers, set before they import


def each(
    work: Callable[..., Result],
    jobs: Sequence[Mapping[str, Any]],
    *,
    label: str = "",
    workers: int | None = None,
    seen: Callable[[Mapping[str, Any], Result], None] | None = None,
) -> list[Result]:
    """[work(**job) for job in jobs], over processes, with a progress bar. The order is that of the jobs.

    Args:
        work: a function of a module, with arguments and results that can be pickled between processes.
        workers: as many as cores by default.
        seen: called with each job and its result, in order, as soon as those before it are there.
    Raises:
        Whatever `work` raised first.
    """
    workers = workers or usable_cores()
    try:
        running = [_pool(workers).submit(_call, work, job) for job in jobs]
        found = []
        for job, one in zip(jobs, tqdm(running, desc=label, unit="training", delay=5), strict=True):
            result, seconds = one.result()
            found.append(result)
            count_workers(seconds)
            if seen:
                seen(job, result)
        return found
    except BaseException:
        _pool(workers).shutdown(wait=False, cancel_futures=True)
        _pool.cache_clear()
        raise


@functools.cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Kept until the end: a worker takes seconds to import torch."""
    with environment(QUIET):
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=belong_to_the_parent)
        for one in [pool.submit(time.sleep, 0.05) for _ in range(workers)]:  # start all of them in this environment
            one.result()
    return pool


def belong_to_the_parent() -> None:
    """Called first in a process that was started for its parent: leave interrupts to it, and leave with it.

    Ctrl-C reaches every process of a terminal, and one of them should speak. A parent that was killed must not leave
    processes behind that go on computing and writing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()


def _leave_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(work: Callable[..., Result], job: Mapping[str, Any]) -> tuple[Result, float]:
    """(the result, CPU seconds that it took)."""
    import torch

    torch.set_num_threads(1)
    start = time.process_time()
    return work(**job), time.process_time() - start


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables for processes that are started within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
