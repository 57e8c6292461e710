"""What computes: versions of Python, of the libraries and of this code."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

_LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "numpy", "rouge-score")


def versions() -> dict[str, str]:
    """Of Python and of the libraries that alter results, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


@cache
def git_commit() -> str | None:
    """Of the checkout that this code lies in, with -dirty after it where files were changed; None without one."""
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
