"""The process group: one process per device, also when there is only one."""

import itertools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from todi.runtime.lost import PeersLost, peers_are_lost
from todi.runtime.sole_process import check_sole_process
from todi.runtime.waiting import MeetingPlace
from todi.runtime.whereabouts import HERE, wait_for_an_end

TIMEOUT = 7200  # seconds that ranks wait for one another, where no setting says otherwise
# Seconds that a rank which has lost the others leaves them to say why: its own end has torchrun's agent end them. Once
# one has ended the agent does that anyway.
_LAST_WORDS = 5.0

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

    def largest_later(self, values: Callable[[], Sequence[float]], device: torch.device) -> Callable[[], list[float]]:
        """The same without waiting: sends what `values` gives now, beside whatever the device has to do, and returns
        what gives the largest. A process by itself sends nothing, and asks `values` only then."""
        if self.size == 1:
            return lambda: list(values())
        tensor = torch.tensor(values())
        if device.type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)  # from other memory the copy would wait
        sent = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)

        def receive() -> list[float]:
            # on another stream, which waits for what was sent and not for the work that was queued behind it
            with torch.cuda.stream(_reading_stream(device)) if device.type == "cuda" else nullcontext():
                sent.wait()
                return tensor.tolist()
        return receive

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        _meet()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The first rank's `value`, on every rank. A `gather` would send as many bytes for each of the others, too."""
        if self.size == 1:
            return value
        _meet()
        sent = [value if self.is_main else None]
        dist.broadcast_object_list(sent, src=0)
        dist.barrier()  # the first rank may end, or write what the others look at, once all of them have it
        return sent[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            _meet()
            dist.barrier()


@cache
def _reading_stream(device: torch.device) -> torch.cuda.Stream:
    """For what is read while the device works. One for all steps: torch has a pool of streams, and hands out in turn
    what others may be using too."""
    return torch.cuda.Stream(device)


def _meet() -> None:
    """Before what a rank may come to much later than the others."""
    if _place:
        _place.meet()


def world_from_environment() -> World:
    """Of a process group that is there already, else what torchrun sets; without either a world of its own.

    Raises:
        InputError: srun or mpirun started this process and others, which know nothing of each other.
    """
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        check_sole_process(os.environ)
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))


@contextmanager
def process_group(world: World, device: torch.device, timeout: float = TIMEOUT) -> Iterator[None]:
    """Within the block the ranks can talk: by NCCL between GPUs, by gloo between CPU processes.

    A group that is there already is used, and left as it is. After the block DeepSpeed remembers no group of it, so
    that another block may follow.

    Args:
        timeout: seconds that ranks wait for one another.

    Raises:
        RunError: a rank did not come in time, here or in `gather`, `from_main` or `barrier` of a `World`.
        PeersLost: another rank has ended, whatever error of the block says so.
    """
    global _place
    import deepspeed  # takes seconds, which an evaluation in one process need not wait for
    from deepspeed.utils import groups

    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory reduction for a minute at the first start; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        before = groups._WORLD_GROUP
        try:
            yield
        finally:
            if before is None and groups._WORLD_GROUP is not None:  # DeepSpeed's copy of the caller's group
                dist.destroy_process_group(groups._WORLD_GROUP)
                groups._WORLD_GROUP = None
        return
    with _environment(world), _lost_peers_named(world):
        _start_process_group(world, device, timeout)
        try:
            yield
        finally:
            deepspeed.comm.destroy_process_group()  # torch's, and all that DeepSpeed keeps of it
            _place = None


@contextmanager
def _lost_peers_named(world: World) -> Iterator[None]:
    """What follows from the end of another rank becomes one line; any other error is noted as this rank's own."""
    try:
        yield
    except Exception as error:
        HERE.note(error)
        if world.size == 1 or not peers_are_lost(error):
            raise
        if _agent_keeps_store():
            wait_for_an_end(_LAST_WORDS)
        raise PeersLost(f"rank {world.rank} lost the others in {HERE.record.place}") from None


def _agent_keeps_store() -> bool:
    """Whether torchrun's agent started this rank; it keeps a store of all ranks, else the first of them does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


_groups_started = itertools.count()


def _start_process_group(world: World, device: torch.device, timeout: float) -> None:
    global _place
    import deepspeed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _store(world, timeout)
    if world.size > 1:
        _place = MeetingPlace(dist.PrefixStore("meetings", store), world.rank, world.size, timeout)
        _place.meet()
    binding = {"device_id": device} if device.type == "cuda" and world.size > 1 else {}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("group", store),
                            rank=world.rank, world_size=world.size, timeout=timedelta(seconds=timeout), **binding)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _store(world: World, timeout: float) -> dist.Store:
    """Of all ranks: torchrun keeps one, without it the first rank does.

    torchrun's outlives a group, and a second group would read what the first one wrote there: each has a part of its
    own.
    """
    if world.size == 1:
        return dist.HashStore()
    keeps = world.is_main and not _agent_keeps_store()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=keeps,
                          wait_for_workers=False, multi_tenant=True, timeout=timedelta(seconds=timeout))
    return dist.PrefixStore(f"todi/{next(_groups_started)}", store)


@contextmanager
def _environment(world: World) -> Iterator[None]:
    """Within the block, sets what DeepSpeed and the meeting of the ranks read, as far as torchrun has not set it."""
    wanted = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "RANK": world.rank, "WORLD_SIZE": world.size,
              "LOCAL_RANK": world.local_rank, "LOCAL_SIZE": world.local_size}
    ours = {name: str(value) for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
