"""Speed and time left of a run, evaluations apart."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Counts the time of training; a resumed run goes on with the seconds of the earlier ones.

    Args:
        step: optimizer steps that are done.
        seconds: that they took.
    """

    def __init__(self, total_steps: int, step: int = 0, seconds: float = 0.0):
        self.total_steps = total_steps
        self.samples = 0
        self._first_step, self._earlier = step, seconds
        self._started = time.perf_counter()
        self._lap = 0.0

    def seconds(self) -> float:
        """Seconds of training so far, of earlier runs too."""
        return self._earlier + self._since_start()

    def samples_per_second(self) -> float:
        """Since this process began to train."""
        return self.samples / self._since_start()

    def lap(self) -> float:
        """Seconds of training since the last call or, at first, since this process began to train."""
        before, self._lap = self._lap, self._since_start()
        return self._lap - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - paused

    def left(self, step: int) -> str:
        """Estimated time left after `step` steps, h:mm:ss."""
        seconds = int(self._since_start() / (step - self._first_step) * (self.total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _since_start(self) -> float:
        return time.perf_counter() - self._started
