"""When a resume state is due within an epoch."""

import time

LARGEST_SHARE = 0.02  # of the time may go into timed states, whatever interval was asked for


class Cadence:
    """An interval in steps or in minutes.

    Args:
        every: a number of steps ("500") or of minutes ("30m"); 0 is never.
    """

    def __init__(self, every: str):
        number, is_minutes = every.removesuffix("m"), every.endswith("m")
        self.steps = 0 if is_minutes else int(number)
        self.seconds = 60.0 * int(number) if is_minutes else 0.0
        self._next = time.monotonic() + self.seconds

    def is_due(self, step: int) -> bool:
        """Whether to write one after `step` steps."""
        if self.seconds:
            return time.monotonic() >= self._next
        return bool(self.steps) and step % self.steps == 0

    def written(self, took: float) -> None:
        """Starts the interval again after a state that took so many seconds; longer where states are slow."""
        self._next = time.monotonic() + max(self.seconds, took / LARGEST_SHARE)
