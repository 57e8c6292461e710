"""Ranks that are threads of this process: what they do together, without a process group and its seconds."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from todi.errors import RunError

_PATIENCE = 20  # seconds that they wait for one another
_LEAVE = 0.5  # seconds for those that have met this rank to go on from there


class ThreadWorld:
    """A `World` of such a rank; `barrier` and `said` are those of all."""

    def __init__(self, rank: int, barrier: threading.Barrier, said: list[Any]):
        self.rank = self.local_rank = rank
        self.size = self.local_size = len(said)
        self.is_main = rank == 0
        self._barrier, self._said = barrier, said

    def barrier(self) -> None:
        self._barrier.wait()

    def gather(self, value: Any) -> list[Any]:
        self._said[self.rank] = value
        self.barrier()
        said = list(self._said)
        self.barrier()
        return said

    def from_main(self, value: Any) -> Any:
        return self.gather(value)[0]


def on_ranks(count: int, work: Callable[[ThreadWorld], Any]) -> list[Any]:
    """What `work` returns on each of so many ranks, or the error of the run that it raises there, which ends all."""
    barrier, said = threading.Barrier(count, timeout=_PATIENCE), [None] * count

    def one(rank: int) -> Any:
        try:
            return work(ThreadWorld(rank, barrier, said))
        except (RunError, threading.BrokenBarrierError) as error:
            time.sleep(_LEAVE)
            barrier.abort()  # whoever waits for this rank now would do so in vain
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
