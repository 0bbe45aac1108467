"""What the machine is and what a run costs on it. No torch: the command line starts fast."""

import os
import platform
import sys

import psutil

_in_workers = 0.0


def cpu_seconds() -> float:
    """CPU seconds used so far by this process, its finished children and its workers, user and system, over all threads."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + _in_workers


def count_workers(seconds: float) -> None:
    """Add what processes have used that are still there, and so are nobody's finished children."""
    global _in_workers
    _in_workers += seconds


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has inside many containers."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, object]:
    """Host, system, processor, usable cores, memory and GPU (None where there is none, or torch is not loaded)."""
    gpu = None
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_name()
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
    }
