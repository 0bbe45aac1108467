"""The clocks of all benchmarks: CPU seconds, the best of several calls; or two works in turn, for ratios."""

import time


def cpu(work, repeat=3):
    """(best CPU seconds of `repeat` calls, the last result). The best, because everything else only adds."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return best, result


def in_turn(first, second, repeat=5):
    """[(seconds of the first, seconds of the second)] of calls made in turn, after one of each that does not count."""
    first(), second()
    pairs = []
    for _ in range(repeat):
        times = []
        for work in (first, second):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        pairs.append(tuple(times))
    return pairs
