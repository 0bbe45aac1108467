"""One clock for all benchmarks: CPU seconds, the best of several calls."""

import time


def cpu(work, repeat=3):
    """(best CPU seconds of `repeat` calls, the last result). The best, because everything else only adds."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return best, result
