"""Ranks wait for one another, and say for whom.

A collective operation gives up after a fixed time and does not say who was missing. What a single rank does for all of
them (checksums, a checkpoint, scores) may take longer than that, so the ranks meet in a store before they begin one.
"""

import logging
import time
from dataclasses import dataclass

from torch.distributed import DistNetworkError, Store

from todi.errors import RunError
from todi.runtime.lost import PeersLost
from todi.runtime.whereabouts import ended_ranks, waiting

logger = logging.getLogger(__name__)

_PAUSE = 0.001, 1.0  # seconds between two looks at who has come, the shortest and the longest
_LATER = 0.1  # of the time that a rank has waited, until it looks again
_REPORT = 30.0  # seconds between two lines about who is missing


@dataclass
class MeetingPlace:
    """Where the ranks meet again and again. Every rank has one, of a store that all of them see.

    Attributes:
        limit: seconds that a rank waits for the others.
        meetings: that this rank has come to.
    """

    store: Store
    rank: int
    size: int
    limit: float
    meetings: int = 0

    def meet(self) -> None:
        """Returns when every rank has called it as often as this one.

        Raises:
            PeersLost: a rank of this node that has not come has ended, or whoever keeps the store: rank 0, or the first
            node's torchrun.
            RunError: a rank does not come in time.
        """
        try:
            with waiting():
                self._meet()
        except DistNetworkError:
            raise PeersLost(f"rank {self.rank} cannot reach the process that keeps the ranks together: rank 0, or the "
                            "first node's torchrun, has ended") from None

    def _meet(self) -> None:
        self.meetings += 1
        self.store.set(_at(self.rank), str(self.meetings))
        if self.store.add("arrivals", 1) == self.meetings * self.size:
            self.store.set(_complete(self.meetings), "")
            self.store.delete_key(_complete(self.meetings - 1))  # all have left it
            return
        started, said = time.monotonic(), 0.0
        # the store could be waited for, but says on the screen when it was in vain
        while not self.store.check([_complete(self.meetings)]):
            waited = time.monotonic() - started
            time.sleep(min(max(waited * _LATER, _PAUSE[0]), _PAUSE[1]))
            if waited > _PAUSE[1]:
                self._look_for_ended_ranks()
            if waited >= min(said + _REPORT, self.limit):
                self._report(waited)
                said = waited

    def _look_for_ended_ranks(self) -> None:
        """One that never comes need not be waited for until torchrun's agent ends this process, half a minute later."""
        for rank in ended_ranks():
            if self._meetings_of(rank) < self.meetings:
                raise PeersLost(f"rank {rank}, which rank {self.rank} waits for, has ended")

    def _report(self, seconds: float) -> None:
        """Says who is missing: the first of those that wait does. Raises RunError when the time is over."""
        missing = [rank for rank in range(self.size) if self._meetings_of(rank) < self.meetings]
        names = ", ".join(map(str, missing))
        if seconds >= self.limit:
            raise RunError(f"rank {names} did not come to where rank {self.rank} waits within {self.limit:g} s "
                           "(PROCESS_GROUP_TIMEOUT)")
        if self.rank not in missing and all(rank in missing for rank in range(self.rank)):
            logger.warning("rank %d waits for rank %s, %.0f s so far", self.rank, names, seconds)

    def _meetings_of(self, rank: int) -> int:
        return int(self.store.get(_at(rank))) if self.store.check([_at(rank)]) else 0


def _at(rank: int) -> str:
    return f"meetings of rank {rank}"


def _complete(meeting: int) -> str:
    return f"meeting {meeting}"
