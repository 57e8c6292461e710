"""The folder of a run: what made it, whether it may go on, and who writes to it."""

import dataclasses
import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from todi.errors import InputError
from todi.runtime.checksums import file_checksum
from todi.runtime.distributed import World
from todi.runtime.storage import discard, write_text, writing
from todi.settings import TrainConfig
from todi.training.checkpoints import BestCheckpoints
from todi.training.state import StateStore

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "numpy", "rouge-score")


def describe_run(config: TrainConfig, world_size: int, data_files: list[Path],
                 teacher: str | None) -> dict[str, Any]:
    """What args.json holds: settings, checksums of the data, versions of what computes.

    `deciding` is what a resumed run must share with the one before: it alters the result.

    Args:
        teacher: where its hidden states come from; None without one.
    """
    optim = config.optim
    step_samples = optim.batch_size * optim.gradient_accumulation_steps * world_size
    data = {name: file_checksum(file) for file, name in names_of(data_files).items()}
    return {
        "settings": dataclasses.asdict(config),
        "deciding": config.deciding | {"samples of a step": step_samples, "teacher": teacher} | data,
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "git_commit": _git_commit(),
    }


def names_of(data_files: Sequence[Path]) -> dict[Path, str]:
    """What `deciding` calls each data file: its name, or its path where several have that name."""
    names = [file.name for file in data_files]
    return {file: file.name if names.count(file.name) == 1 else str(file) for file in data_files}


def check_same_run(folder: Path, run: dict[str, Any]) -> None:
    """Whether what lies in `folder`, if anything, is of the same run.

    Raises:
        InputError: it is not; lists every difference.
    """
    file = folder / "args.json"
    if not file.is_file():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["deciding"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is not of a run that can be gone on with; choose another --save-dir, or start "
                         "anew with --resume never") from None
    now = json.loads(json.dumps(run["deciding"]))
    differing = [name for name in before | now if before.get(name) != now.get(name)]
    if differing:
        listed = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in differing)
        raise InputError(f"{folder} holds a run that differs: {listed}. Choose another --save-dir, start anew with "
                         "--resume never (removes that run), or go on all the same with --resume force")


def decided_earlier(folder: Path) -> dict[str, Any]:
    """What decided the run in `folder`; empty where there is none that can be gone on with."""
    try:
        return json.loads((folder / "args.json").read_text(encoding="utf-8"))["deciding"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def begin(folder: Path, run: dict[str, Any], world: World, anew: bool) -> bool:
    """Takes hold of the run's folder; False when the run in it has finished, so that there is nothing to do.

    Args:
        anew: remove what an earlier run left there.
    """
    states = StateStore(folder, world)
    if world.is_main:
        _claim(folder)
        if anew and states.folder.is_dir():
            discard(states.folder)
    finished = world.gather(states.finished)[0]
    if world.is_main and finished is None:
        write_text(folder / "args.json", json.dumps(run, indent=2) + "\n")
    elif world.is_main:  # it may have been killed while it tidied up
        states.clear()
        BestCheckpoints(folder, keep=0, writes_files=True, kept=finished.best).release()
        logger.info("%s has finished after %d steps; nothing to do (--resume never would start it anew)", folder,
                    finished.step)
    return finished is None


def _claim(folder: Path) -> None:
    """Makes `folder` and keeps other runs out of it for as long as this process lives.

    Raises:
        InputError: another run is writing there.
        StorageError: it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)  # never closed: the lock lasts until the process ends
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"another run is writing to {folder}") from None


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout
    return answer.stdout.strip()
