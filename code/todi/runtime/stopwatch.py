"""Where the time of a process goes, without making its device wait."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments, and later says how far they lie apart."""

    def mark(self) -> Any:
        """This moment."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks."""


class ThreadClock:
    """The processor time of this thread, for a CPU: what waits for other ranks, for a disk, or for its turn takes none.

    Threads of an operation work while the one that called it does, so its time is that of the operation.
    """

    def mark(self) -> float:
        return time.thread_time()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class EventClock:
    """The time line of a GPU's current stream. Only `seconds` waits, for the second mark to be reached."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock that fits a device."""
    return EventClock() if device.type == "cuda" else ThreadClock()


class Stopwatch:
    """Sums up the time of phases. One phase within another counts for itself alone.

    Args:
        clock: by which time is taken; it is read when the sums are.
    """

    def __init__(self, clock: Clock):
        self._clock = clock
        self._open: list[str] = []
        self._stretches: list[tuple[str, Any, Any]] = []  # phase, start, end
        self._start: Any = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done within the block belongs to phase `name`."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading."""
        seconds: Counter[str] = Counter()
        for name, start, end in self._stretches:
            seconds[name] += self._clock.seconds(start, end)
        self._stretches.clear()
        return dict(seconds)

    def _switch(self) -> None:
        """Ends a stretch of the phase that is open, if there is one, and begins another."""
        now = self._clock.mark()
        if self._open:
            self._stretches.append((self._open[-1], self._start, now))
        self._start = now
