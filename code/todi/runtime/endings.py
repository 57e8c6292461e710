"""How ranks ended, and which of the ends is the cause of the others."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from todi.runtime.lost import LOST
from todi.runtime.signals import STOPPING
from todi.runtime.whereabouts import Record


@dataclass(frozen=True)
class Ending:
    """A rank that did not end well.

    Attributes:
        exit_code: of the process; minus the number of the signal that killed it.
        record: where it stood.
    """

    rank: int
    pid: int
    exit_code: int
    record: Record

    @property
    def is_consequence(self) -> bool:
        """Whether it has ended for the others did."""
        return self.exit_code == LOST and not self.record.trouble

    @property
    def was_asked_for(self) -> bool:
        """Whether it has stopped by itself after a signal, and has said so."""
        return self.exit_code - 128 in STOPPING

    @property
    def shell_code(self) -> int:
        """The exit code that a shell would have of it."""
        return self.exit_code if self.exit_code > 0 else 128 - self.exit_code

    def in_words(self, host: str) -> str:
        """What happened to it, where."""
        who, place = f"rank {self.rank} (pid {self.pid}, host {host})", self.record.place
        if self.record.trouble:
            return f"{who} ended in {place}: {self.record.trouble}"
        if self.exit_code == -signal.SIGKILL:
            return (f"{who} was killed by SIGKILL in {place}: by hand, or by the system, as when memory runs out "
                    "(dmesg says)")
        if self.exit_code < 0:
            return f"{who} was killed by {_name(-self.exit_code)} in {place}"
        return f"{who} ended in {place} with exit code {self.exit_code}; what it said is above"


def cause_of(endings: Sequence[Ending]) -> Ending:
    """The first that is not a consequence: ranks that lost the others, and those that SIGTERM ended then.

    Args:
        endings: at least one, in the order in which they were seen.
    """
    def rank(ending: Ending) -> int:
        if ending.is_consequence:
            return 2
        return int(ending.exit_code == -signal.SIGTERM and not ending.record.trouble)

    return min(endings, key=rank)


def lost_line(endings: Sequence[Ending]) -> str:
    """For a node whose ranks have all lost those of another one."""
    ranks = ", ".join(str(ending.rank) for ending in endings)
    return (f"error: rank {ranks} of this node lost the others in {endings[0].record.place}; the launcher of another "
            "node says why")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
