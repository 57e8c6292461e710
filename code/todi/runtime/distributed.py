"""The process group: one process per device, also when there is only one."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among its fellows. `rank` 0 writes the files and talks to the user."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The largest of each number over all ranks. A process by itself need not ask its device, which would wait."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()


def world_from_environment() -> World:
    """Reads what torchrun sets; a process that was started without it is a world of its own."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Within the block the ranks can talk: by NCCL between GPUs, by gloo between CPU processes.

    A group that is there already is used, and left as it is.
    """
    if dist.is_initialized():
        yield
        return
    _start_process_group(world, device)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _start_process_group(world: World, device: torch.device) -> None:
    import deepspeed  # takes seconds, which an evaluation in one process need not wait for

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank),
                        ("LOCAL_SIZE", world.local_size)):
        os.environ.setdefault(name, str(value))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # DeepSpeed would compile a shared-memory reduction for a minute at the first start; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False,
                               verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
