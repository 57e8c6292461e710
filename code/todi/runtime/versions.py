"""What computes: versions of Python, of the libraries and of this code."""

import hashlib
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


@cache
def code_checksum() -> str:
    """Of this package's own files: also where there is no checkout, or it was changed."""
    package, whole = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        whole.update(f"{file.relative_to(package)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return whole.hexdigest()
