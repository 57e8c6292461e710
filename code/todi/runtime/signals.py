"""Requests to stop: noted when they arrive, heeded between two steps."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# SIGUSR1: what schedulers send before they preempt; SIGHUP: what comes when a terminal goes
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_REQUEST = 1.0  # seconds; a scheduler may signal a process, and its parent may pass the signal on


class Interrupted(Exception):
    """The run stops because of a signal, its state saved. Entry points exit with 128 + `number`, as shells do."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")


class StopSignals:
    """Within its block, takes note of the first signal; a second one does what it would have done without us.

    Only in the main thread, where Python allows it; in another one signals are not seen. Under nohup SIGHUP is none.

    Attributes:
        received: the signal's number, or 0.
    """

    def __init__(self):
        self.received = 0
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING
                            if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._when = number, time.monotonic()
        elif time.monotonic() - self._when > SAME_REQUEST:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
