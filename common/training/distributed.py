"""Several processes as one: the only file that knows how many there are.

The engine is torch's: `torchrun` starts the processes, `DistributedDataParallel` keeps whole copies of the model and
averages their gradients, FSDP2 (`fully_shard`) keeps a part of each parameter in each process and gathers it when needed.
Losses are divided by the number of targets over ALL processes, so that the result does not depend on how many there are.

    torchrun --nproc-per-node 2 05_pretraining/run.py --parallel data        (or --parallel shards)

On one machine without GPUs `spread` starts them itself: two processes with a thread each do more than one with two threads,
and do not wait for each other in every product when the machine is busy.

With `--max-restarts` and a rendezvous by c10d, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: torch 2.13 keeps the addresses of
the dead processes in its store, and one that is started again may wait for them.
"""

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.foundation.parallel import belong_to_the_parent, environment

Parallel = Literal["none", "data", "shards"]


@dataclass(frozen=True)
class World:
    """This process and how many there are."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    @contextmanager
    def joined(cls, device: str = "cpu") -> Iterator["World"]:
        """Join the group that `torchrun` describes in the environment; alone where it describes none."""
        if "WORLD_SIZE" not in os.environ:
            yield cls(device=device)
            return
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), device)
            dist.barrier()
        finally:
            dist.destroy_process_group()

    def wrap(self, model: nn.Module, how: Parallel) -> nn.Module:
        """The model, ready for this world. Make the optimizers after it: sharding replaces the parameters.

        Raises ValueError for one process of several without a way to share the work.
        """
        model = model.to(self.device)
        if how == "none":
            if self.size > 1:
                raise ValueError(
                    f"{self.size} processes would train {self.size} models: choose parallel data or shards"
                )
            return model
        if not dist.is_initialized():
            raise ValueError(f"parallel {how} needs processes: start with torchrun --nproc-per-node N")
        if how == "data":
            return DistributedDataParallel(model)
        # Not at the top: FSDP takes most of a second to import, and few trainings need it.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device, (self.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def same(self, value: Any) -> Any:
        """The value of the first process, in each: what was measured must not differ."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def meet(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def only_sync_if(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Exchange gradients with the last micro-batch alone; before it they add up in each process."""
        if is_sharded(model):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return contextlib.nullcontext()


def is_sharded(model: nn.Module) -> bool:
    """True for what `fully_shard` made: known by its method, so that the class need not be imported."""
    return hasattr(model, "set_requires_gradient_sync")


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, of which each process may hold a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def inner(model: nn.Module) -> nn.Module:
    """The model itself, out of wrappers that put a prefix before every name: what is saved, and what names refer to."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile (gallery: pretraining/compiled-names)
            model = model._orig_mod
        else:
            return model


def spread(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """work(world, *arguments) in so many processes of this machine, one thread each; returns when all are done.

    Args:
        work: a function of a module, with arguments that can be pickled between processes.
    Raises:
        RuntimeError: one of them failed; what it said is on standard error, and the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, environment({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}):
        meeting = (Path(folder) / "meeting").as_uri()
        started = [
            context.Process(target=_member, args=(rank, processes, meeting, work, *arguments))
            for rank in range(processes)
        ]
        for one in started:
            one.start()
        try:
            waiting = True
            while waiting:
                waiting = any(one.is_alive() for one in started)
                failed = [rank for rank, one in enumerate(started) if one.exitcode]
                if failed:
                    raise RuntimeError(f"process {failed[0]} of {processes} failed: see above")
                started[0].join(0.05)
        finally:
            for one in started:
                one.terminate()
                one.join()


def _member(rank: int, size: int, meeting: str, work: Callable[..., None], *arguments: Any) -> None:
    belong_to_the_parent()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    try:
        work(World(rank, size), *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
