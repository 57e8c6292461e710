"""args.json: what made a run, and whether another one is the same."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from todi.errors import InputError
from todi.runtime.versions import git_commit, versions
from todi.settings import TrainConfig

FORMAT = 2  # 1 had the checksums of train.jsonl and dev.jsonl among `deciding`, by these names, and no others


def describe_run(config: TrainConfig, world_size: int, files: Mapping[str, str], teacher: str | None) -> dict[str, Any]:
    """What args.json holds: settings, checksums of what was read, versions of what computes.

    `deciding` and `files` are what a resumed run must share with the one before: they alter the result.

    Args:
        files: checksums of data, models, adapters and plugins, by path.
        teacher: where its hidden states come from; None without one.
    """
    return {
        "format": FORMAT,
        "settings": dataclasses.asdict(config),
        "deciding": config.deciding | {"samples of a step": config.optim.step_samples(world_size), "teacher": teacher},
        "files": dict(files),
        "command": sys.argv,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def read_record(folder: Path) -> dict[str, Any] | None:
    """What args.json in `folder` holds; None without one.

    Raises:
        InputError: there is one that no run wrote.
    """
    file = folder / "args.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        _ = record["deciding"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file} is not of a run that can be gone on with; choose another --save-dir, or start "
                         "anew with --resume never") from None
    return record


def check_same_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Whether what lies in `folder`, if anything, is of the same run.

    Raises:
        InputError: it is not; lists every difference.
    """
    before = read_record(folder)
    differing = [] if before is None else differences(before, run)
    if differing:
        raise InputError(f"{folder} holds a run that differs: {'; '.join(differing)}. Choose another --save-dir, start "
                         "anew with --resume never (removes that run), or go on all the same with --resume force")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two runs, of all that alters the result, a sentence each.

    A setting that an earlier version did not have counts as its default.
    """
    then, files = dict(before["deciding"]), before.get("files")
    if files is None:
        by_name = {name: then.pop(name) for name in ("train.jsonl", "dev.jsonl")}
        files = {path: by_name[Path(path).name] for path in now["files"] if Path(path).name in by_name}
    then = TrainConfig.defaults() | then
    settings = [f"{name} was {then.get(name)!r}, is {now['deciding'].get(name)!r}" for name in then | now["deciding"]
                if _plain(then.get(name)) != _plain(now["deciding"].get(name))]
    return settings + [f"{path} is not what it was" for path in files
                       if path in now["files"] and files[path] != now["files"][path]]


def _plain(value: Any) -> Any:
    """As JSON has it; a list of one as that one, and of none as None: some settings became lists."""
    if isinstance(value, list | tuple):
        return list(value) if len(value) > 1 else next(iter(value), None)
    return value
