import random

import numpy as np
import pytest
import torch

from common.foundation.device import Device, matmul_flops, pick_device, seed_everything
from common.foundation.machine import cpu_seconds, describe_machine, peak_memory_bytes


def test_seed_everything_repeats_all_three():
    draws = []
    for _ in range(2):
        seed_everything(3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]


def test_pick_device_measures_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPINE_CACHE", str(tmp_path))
    first = pick_device("cpu")
    assert first.fp32_flops > 1e8
    assert first == pick_device("cpu"), "the second answer is the cached one, to the last digit"
    (cache,) = tmp_path.glob("matmul-*.json")
    cache.write_text("{")
    assert pick_device("cpu").name == "cpu", "a damaged cache is measured again"


def test_bf16_only_where_it_is_measured_faster():
    slow, fast = Device("cpu", "x", 1, 100.0, 105.0), Device("cpu", "x", 1, 100.0, 300.0)
    assert (slow.dtype, slow.peak_flops) == (torch.float32, 100.0)
    assert (fast.dtype, fast.peak_flops) == (torch.bfloat16, 300.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_device_says_what_there_is():
    with pytest.raises(ValueError, match="there is .*cpu"):
        pick_device("cuda")


def test_matmul_rate_is_positive():
    assert matmul_flops("cpu", torch.float32, width=64, seconds=0.01) > 0


def test_machine_describes_itself():
    found = describe_machine()
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1e8
    assert peak_memory_bytes() > 1e7
    assert cpu_seconds() > 0
