"""Training in several processes: the only file that knows how many there are.

The machinery is torch's: `torchrun` starts the processes, `DistributedDataParallel` keeps a whole copy of the model in each
and averages their gradients, FSDP2 (`fully_shard`) keeps a part of each parameter in each and gathers it when needed.
The trainer divides losses by the number of units over ALL processes, so that the result does not depend on their number.

    torchrun --nproc-per-node 2 05_pretraining/run.py --parallel data        (or --parallel shards)

On one machine without GPUs `spread` starts the processes itself. Two processes with one thread each do more than one process
with two threads, and on a busy machine they do not wait for each other in every matrix product.

With `--max-restarts` and the rendezvous backend c10d, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: torch 2.13 keeps the
addresses of dead processes in its store, and one that is started again may wait for them.
"""

import contextlib
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
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from common.foundation.parallel import belong_to_the_parent, environment

Parallel = Literal["none", "data", "shards"]


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    @contextmanager
    def joined(cls, device: str = "cpu") -> Iterator["World"]:
        """Join the group that `torchrun` describes in the environment; a world of one where it describes none."""
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
        """Make the model ready for this world. Make the optimizers afterwards: sharding replaces the parameters.

        Raises:
            ValueError: several processes have no way to share the work, or one process is to share it with nobody.
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
        # Imported here and not at the top: FSDP takes most of a second to import, and few trainings need it.
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
        """Broadcast the value of rank 0. Use it for anything that was measured, so that ranks cannot disagree."""
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
        """Exchange gradients only if this is the last micro-batch; until then each process adds up its own."""
        if is_sharded(model):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return contextlib.nullcontext()


def is_sharded(model: nn.Module) -> bool:
    """True for what `fully_shard` made. It is recognised by a method, so that its class need not be imported."""
    return hasattr(model, "set_requires_gradient_sync")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a part; every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def inner(model: nn.Module) -> nn.Module:
    """The model without the wrappers that put a prefix before every parameter's name. Its names are the ones saved."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile (gallery: pretraining/compiled-names)
            model = model._orig_mod
        else:
            return model


def spread(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run work(world, *arguments) in this many processes of this machine, with one thread each, until all are done.

    Args:
        work: a function of a module, with arguments that can be pickled between processes.
    Raises:
        torch.multiprocessing.spawn.ProcessException: one of them failed or was killed. The message holds its traceback,
            and the others have been stopped.
    """
    with tempfile.TemporaryDirectory() as folder, environment({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}):
        meeting = (Path(folder) / "meeting").as_uri()
        running = start_processes(_member, (processes, meeting, work, *arguments), processes, join=False)
        try:
            while not running.join():  # raises as soon as one has failed, and stops the others
                pass
        finally:  # Ctrl-C does not reach the children (see `belong_to_the_parent`): stop them here
            for one in running.processes:
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
