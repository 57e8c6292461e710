"""Ranks that are threads of this process: what they do together, without a process group and its seconds."""

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from todi.errors import RunError
from todi.runtime.lost import PeersLost

_PATIENCE = 20  # seconds that they wait for one another


class Meetings:
    """Where so many ranks say things to one another, time after time, and what each has said.

    A meeting to which all have come is held, whatever becomes of them then. One to which a rank can no longer come,
    because it has left, is not.
    """

    def __init__(self, count: int):
        self.count = count
        self._changed = threading.Condition()
        self._said: defaultdict[int, dict[int, Any]] = defaultdict(dict)  # at each meeting, by the rank
        self._gone: set[int] = set()

    def meet(self, number: int, rank: int, value: Any) -> list[Any]:
        """What all say at a meeting, in the order of ranks. Raises PeersLost where it cannot be held."""
        with self._changed:
            said = self._said[number]
            said[rank] = value
            self._changed.notify_all()
            came = self._changed.wait_for(lambda: len(said) == self.count or self._gone - said.keys(), _PATIENCE)
            assert came, f"rank {rank} has waited {_PATIENCE} s for others than {sorted(said)}"
            if len(said) < self.count:
                raise PeersLost(f"rank {rank} waits for {sorted(self._gone - said.keys())}, which has left")
            return [said[other] for other in range(self.count)]

    def leave(self, rank: int) -> None:
        """The rank comes to no further meeting."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()


class ThreadWorld:
    """A `World` of such a rank."""

    def __init__(self, rank: int, meetings: Meetings):
        self.rank = self.local_rank = rank
        self.size = self.local_size = meetings.count
        self.is_main = rank == 0
        self._meetings, self._met = meetings, 0

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        self._met += 1
        return self._meetings.meet(self._met, self.rank, value)

    def from_main(self, value: Any) -> Any:
        return self.gather(value)[0]


def on_ranks(count: int, work: Callable[[ThreadWorld], Any]) -> list[Any]:
    """What `work` returns on each of so many ranks, or the error of the run that it raises there."""
    meetings = Meetings(count)

    def one(rank: int) -> Any:
        try:
            return work(ThreadWorld(rank, meetings))
        except RunError as error:
            return error
        finally:
            meetings.leave(rank)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
