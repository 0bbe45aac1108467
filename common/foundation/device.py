"""Seeds, and the choice of device and number format from a measurement, not from a table.

Whether bf16 is faster than fp32 depends on the processor: on a CPU without the instructions it is several times
slower. So both are measured once, cached, and reported; the measured peak is what utilisation is divided by later.
"""

import random
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from common.foundation.assets import cache_directory
from common.foundation.files import read_json, sha256_json, write_json
from common.foundation.machine import cpu_name


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. Samplers take their own seed and do not depend on this."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is what third-party code draws from
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Device:
    """Attributes: `name` is "cuda", "mps" or "cpu"; peaks are measured matmul rates in FLOP per second."""

    name: str
    hardware: str
    threads: int
    fp32_flops: float
    bf16_flops: float

    @property
    def dtype(self) -> torch.dtype:
        """The faster format for matrix products; fp32 unless bf16 gains at least 10 %."""
        return torch.bfloat16 if self.bf16_flops > 1.1 * self.fp32_flops else torch.float32

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 products run at about the speed of fp32: without the instructions they take fifty times longer."""
        return self.bf16_flops > 0.5 * self.fp32_flops

    @property
    def peak_flops(self) -> float:
        """The measured peak in the chosen format: what utilisation is a fraction of."""
        return max(self.fp32_flops, self.bf16_flops) if self.dtype == torch.bfloat16 else self.fp32_flops

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.hardware}, {self.threads} threads): fp32 {self.fp32_flops / 1e9:,.0f} GFLOP/s, "
            f"bf16 {self.bf16_flops / 1e9:,.0f} GFLOP/s, chose {str(self.dtype).removeprefix('torch.')}"
        )


def pick_device(name: str | None = None, *, measure_again: bool = False) -> Device:
    """Choose cuda, then mps, then cpu (or `name`), and measure its matmul peaks once per hardware and thread count.

    Raises ValueError if `name` is given but not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(candidate for candidate, there in available.items() if there)
    elif not available.get(name, False):
        there = ", ".join(candidate for candidate, yes in available.items() if yes)
        raise ValueError(f"device {name!r} is not available here; there is {there}")
    hardware = torch.cuda.get_device_name() if name == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    key = sha256_json([name, hardware, threads, torch.__version__])[:12]
    cache = cache_directory() / f"matmul-{key}.json"
    if cache.exists() and not measure_again:
        try:
            return Device(**read_json(cache))
        except (ValueError, TypeError):  # a damaged or older cache: measure again
            pass
    found = Device(name, hardware, threads, matmul_flops(name, torch.float32), matmul_flops(name, torch.bfloat16))
    write_json(cache, asdict(found))
    return found


def matmul_flops(device: str, dtype: torch.dtype, *, width: int | None = None, seconds: float = 0.15) -> float:
    """The best measured rate of a square matrix product, in FLOP per second (2 * width**3 operations each)."""
    width = width or (4096 if device == "cuda" else 768)
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))

    def synchronize() -> None:
        if device != "cpu":
            getattr(torch, device).synchronize()

    left @ right  # warm-up: the first call allocates and picks a kernel
    synchronize()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        synchronize()
        best = min(best, time.perf_counter() - start)
        if best > seconds:  # emulated formats can be very slow: one measurement is enough to see that
            break
    return 2 * width**3 / best
