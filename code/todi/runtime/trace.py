"""A trace of a few steps: every operation with its time, for https://ui.perfetto.dev or chrome://tracing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from todi.runtime.storage import writing

logger = logging.getLogger(__name__)

_NOT_YET = 2  # steps: the first ones set things up


class StepTrace:
    """Traces a few steps and writes them to a file, once.

    Args:
        steps: how many; there are none of the first two, where there are so many.
    """

    def __init__(self, file: Path, steps: int, device: torch.device):
        self._file = file
        self._steps = steps
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities, on_trace_ready=self._write,
                                schedule=schedule(wait=_NOT_YET - 1, warmup=1, active=steps, repeat=1))
        self._running = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        if not self._running:
            self._profile.start()
            self._running = True
        yield
        self._profile.step()

    def close(self) -> None:
        """Ends; writes what has been traced, if the steps have not all been yet."""
        if self._running:
            self._profile.stop()

    def _write(self, traced: profile) -> None:
        with writing(self._file):
            traced.export_chrome_trace(str(self._file))
        logger.info("trace of steps is in %s (open it at https://ui.perfetto.dev)", self._file)
