"""Which ranks no longer get on: by what each says of where it stands, looked at again and again."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from todi.runtime.whereabouts import Record

TIMEOUT = 1800.0  # seconds without progress, unless HANG_TIMEOUT says otherwise
_GAP = 10.0  # seconds between two looks after which this process itself must have been stopped
_LEAST_SILENCE = 3.0  # seconds without a pulse, which comes every second


def timeout_from_environment() -> float:
    """Seconds after which a rank that does not get on is taken to hang; 0 for never."""
    return float(os.environ.get("HANG_TIMEOUT") or TIMEOUT)


@dataclass(frozen=True)
class Hang:
    """A rank that has not got on for so many `seconds`. A frozen one has no pulse either: it is stopped, or worse."""

    rank: int
    place: str
    seconds: float
    frozen: bool

    def __str__(self) -> str:
        how = "does not answer at all" if self.frozen else "does not get on"
        return f"rank {self.rank} has been in {self.place} for {self.seconds:.0f} s and {how}"


@dataclass
class HangWatch:
    """Remembers when each rank got on last, by its own clock, so that no two machines' clocks are compared.

    Attributes:
        limit: seconds without progress that are too many; 0 for none.
    """

    limit: float
    clock: Callable[[], float] = time.monotonic
    _last_look: float | None = None
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    _pulses: dict[int, tuple[int, float]] = field(default_factory=dict)

    def look(self, records: Mapping[int, Record]) -> list[Hang]:
        """The ranks that hang: those without a pulse if there are any, for the others wait for them; else all that are
        to get on and do not. Ranks that wait for the others in a meeting are not among them.
        """
        now = self.clock()
        if self._last_look is not None and now - self._last_look > _GAP:
            self._beats.clear()
            self._pulses.clear()
        self._last_look = now
        hanging, frozen = [], []
        for rank, record in records.items():
            still = now - _since(self._beats, rank, record.beats, now)
            silent = now - _since(self._pulses, rank, record.pulse, now)
            if record.watched and not record.waits and still >= self.limit:
                hanging.append(Hang(rank, record.place, still, frozen=False))
            if silent >= max(_LEAST_SILENCE, self.limit / 2):
                frozen.append(Hang(rank, record.place, still, frozen=True))
        over = hanging or any(hang.seconds >= self.limit for hang in frozen)
        return (frozen or hanging) if self.limit and over else []


def _since(seen: dict[int, tuple[int, float]], rank: int, count: int, now: float) -> float:
    """When a rank's count became what it is."""
    if rank not in seen or seen[rank][0] != count:
        seen[rank] = count, now
    return seen[rank][1]
