"""What launchers set for a process on a CPU: the allocator."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
_ASK = 'source scripts/lib/common.sh; options=(); choose_allocator; echo "${LD_PRELOAD:-}:${MIMALLOC_PURGE_DELAY:-}"'


@cache
def launched() -> dict[str, str]:
    """Variables for the environment of a process that is to have what a launcher's would; none on a GPU."""
    environment = os.environ | {"PYTHON": sys.executable}
    if environment.get("CUDA_VISIBLE_DEVICES", "0" if Path("/dev/nvidia0").exists() else ""):
        return {}
    done = subprocess.run(["bash", "-c", _ASK], cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, check=True,
                          text=True, stdout=subprocess.PIPE)
    library, _, delay = done.stdout.strip().partition(":")
    return {name: value for name, value in (("LD_PRELOAD", library), ("MIMALLOC_PURGE_DELAY", delay)) if value}


@contextmanager
def as_launched() -> Iterator[None]:
    """For processes that are started in the block."""
    before = os.environ.copy()
    os.environ.update(launched())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
