"""The process group: one process per device, also when there is only one."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from todi.runtime.waiting import MeetingPlace

TIMEOUT = 7200  # seconds that ranks wait for one another, where no setting says otherwise

_place: MeetingPlace | None = None  # of the process group, as torch has one for all


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
        _meet()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            _meet()
            dist.barrier()


def _meet() -> None:
    """Before what a rank may come to much later than the others."""
    if _place:
        _place.meet()


def world_from_environment() -> World:
    """Reads what torchrun sets; a process that was started without it is a world of its own."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))


@contextmanager
def process_group(world: World, device: torch.device, timeout: float = TIMEOUT) -> Iterator[None]:
    """Within the block the ranks can talk: by NCCL between GPUs, by gloo between CPU processes.

    A group that is there already is used, and left as it is.

    Args:
        timeout: seconds that ranks wait for one another.

    Raises:
        RunError: a rank did not come in time, here or in `World.gather` or `World.barrier`.
    """
    global _place
    if dist.is_initialized():
        yield
        return
    _start_process_group(world, device, timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _place = None


def _start_process_group(world: World, device: torch.device, timeout: float) -> None:
    global _place
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
    if world.size > 1:
        _place = MeetingPlace(_store(world, timeout), world.rank, world.size, timeout)
        _place.meet()
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False,
                               verbose=False, timeout=timedelta(seconds=timeout))


def _store(world: World, timeout: float) -> dist.Store:
    """Of all ranks: torchrun keeps one, without it the first rank does."""
    keeps = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=keeps,
                          wait_for_workers=False, multi_tenant=True, timeout=timedelta(seconds=timeout))
    return dist.PrefixStore("todi", store)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
