"""What a run says of itself: log lines, metrics.jsonl, args.json."""

import json
import logging
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from todi.data.records import checksum

_LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "numpy", "rouge-score")


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
        self._file = path.open("a", encoding="utf-8") if path else None

    def write(self, **values: Any) -> None:
        """Writes a line at once, so that a run can be watched."""
        if self._file:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()


def write_args(path: Path, settings: dict[str, Any], data_files: list[Path]) -> None:
    """Writes args.json: every setting, the versions of what computed, and checksums of what it read."""
    record = {
        "settings": settings,
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "git_commit": _git_commit(),
        "data": {str(file): {"sha256": checksum(file)} for file in data_files},
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout
    return answer.stdout.strip()
