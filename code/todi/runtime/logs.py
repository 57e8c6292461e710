"""What a run says of itself while it runs: log lines and metrics.jsonl."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from todi.runtime.storage import writing


def set_up_logging(is_main: bool) -> None:
    """This project's log lines, with a time, on standard output of the main process; its warnings from the others.

    Other libraries keep to their warnings, and show no progress bars of their own.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("todi")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO if is_main else logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


class Metrics:
    """Appends one JSON object a line to `path`; does nothing without a path, as on all ranks but the first."""

    def __init__(self, path: Path | None):
        self._path = path
        self._file = path.open("a", encoding="utf-8") if path else None

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return os.fstat(self._file.fileno()).st_size if self._file else 0

    def cut(self, length: int) -> None:
        """Forgets the lines beyond the first `length` bytes, which are about to be written again."""
        if self._file:
            self._file.truncate(length)

    def write(self, **values: Any) -> None:
        """Writes a line at once, so that a run can be watched."""
        if self._file:
            with writing(self._path):
                self._file.write(json.dumps(values) + "\n")
                self._file.flush()


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
