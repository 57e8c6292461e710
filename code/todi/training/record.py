"""args.json: what made a run, and whether another one is the same."""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from todi.errors import InputError
from todi.runtime.versions import git_commit, versions
from todi.settings import OptimConfig, TrainConfig
from todi.training.deepspeed_config import flat
from todi.training.deepspeed_keys import FIXED, LAYOUT, PLAN

logger = logging.getLogger(__name__)

FORMAT = 2  # 1 had the checksums of train.jsonl and dev.jsonl among `deciding`, by these names, and no others
_STUDENT = "the student"
_STEP = "samples of a step"
# What a resume state is counted in, besides settings and keys of a DeepSpeed file that say so: not even --resume force
# can change it. Everything else comes from the settings again when a run is resumed (training/state.py).
_FIXED = {_STUDENT, _STEP, "samples of an epoch"}


def describe_run(config: TrainConfig, world_size: int, files: Mapping[str, str], teacher: str | None,
                 epoch_samples: int, deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """What args.json holds: settings, checksums of what was read, versions of what computes.

    `deciding`, `deepspeed` and `files` are what a resumed run must share with the one before: they alter the result.

    Args:
        files: checksums of data, models, adapters and plugins, by path.
        teacher: where its hidden states come from; None without one.
        epoch_samples: samples of an epoch.
        deepspeed: the configuration that DeepSpeed runs with.
    """
    return {
        "format": FORMAT,
        "settings": dataclasses.asdict(config),
        "deciding": config.deciding | {_STEP: config.optim.step_samples(world_size),
                                       "samples of an epoch": epoch_samples, "teacher": teacher},
        "deepspeed": {name: value for name, value in deepspeed.items() if name not in PLAN},
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{file} is not of a run that can be gone on with; choose another --save-dir, or start "
                         "anew with --resume never") from None
    return record


def step_to_go_on_with(folder: Path, optim: OptimConfig, devices: int) -> int | None:
    """Samples of a step of the run in `folder`, where nothing but the number of devices says otherwise now.

    Its steps go on to be made of these, so that the same command goes on with more devices or fewer. None where they
    are the same, where the shape of a step was set otherwise, and where there is no run.

    Raises:
        InputError: there is what no run wrote.
    """
    before = read_record(folder)
    samples = before and before["deciding"].get(_STEP)
    if samples in (None, optim.step_samples(devices)) or optim.global_batch_size is not None:
        return None
    then = before.get("settings", {}).get("optim", {})
    shape = ("batch_size", "gradient_accumulation_steps")
    return samples if all(then.get(name) == getattr(optim, name) for name in shape) else None


def with_steps_as_before(config: TrainConfig, devices: int) -> TrainConfig:
    """With the samples of a step of the run that goes on, where there are other devices now; says so."""
    run, optim = config.run, config.optim
    samples = None if run.resume == "never" else step_to_go_on_with(Path(run.save_dir), optim, devices)
    if samples is None:
        return config
    logger.info("steps of %d samples, as of the run that goes on, not of %d: the number of devices is %d now", samples,
                optim.step_samples(devices), devices)
    return dataclasses.replace(config, optim=dataclasses.replace(optim, global_batch_size=samples))


def check_same_run(folder: Path, run: Mapping[str, Any], force: bool = False) -> None:
    """Whether what lies in `folder`, if anything, is of the same run.

    Args:
        force: let it go on though settings differ, where a resume state allows it; says what changes.

    Raises:
        InputError: it is not; lists every difference.
    """
    before = read_record(folder)
    found = {} if before is None else differences(before, run)
    fixed = [sentence for name, sentence in found.items() if _is_fixed(name)]
    anew = "Choose another --save-dir, or start anew with --resume never (removes that run)"
    if force and fixed:
        raise InputError(f"{folder} holds a run that cannot go on with what differs: {'; '.join(fixed)}. {anew}")
    if found and not force:
        going_on = "" if fixed else ", or go on all the same with --resume force"
        raise InputError(f"{folder} holds a run that differs: {'; '.join(found.values())}. {anew}{going_on}")
    for sentence in found.values():
        logger.warning("going on though %s", sentence)


def _is_fixed(name: str) -> bool:
    return name in _FIXED | TrainConfig.fixed() or FIXED.fullmatch(name) is not None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two runs, of all that alters the result: a sentence each, by what it is about.

    A student that was only moved counts as a changed setting, another one at its old or new place as another student.

    A setting that an earlier version did not have counts as its default; what else one of them did not note is passed
    over.
    """
    then, files = dict(before["deciding"]), before.get("files")
    if files is None:
        by_name = {name: then.pop(name) for name in ("train.jsonl", "dev.jsonl")}
        files = {path: by_name[Path(path).name] for path in now["files"] if Path(path).name in by_name}
    then = TrainConfig.defaults() | {name: value for name, value in then.items()
                                     if name not in TrainConfig.changeable()}  # earlier versions held some of them
    found = _changed(then, {name: value for name, value in now["deciding"].items() if name in then})
    if "deepspeed" in before:
        found |= _changed(*({name: value for name, value in flat(one["deepspeed"]).items()
                             if not LAYOUT.fullmatch(name)} for one in (before, now)))
    found |= {path: f"{path} is not what it was" for path in files
              if path in now["files"] and files[path] != now["files"][path]}
    student = now["deciding"]["model_path"]
    weights = now["files"].get(student)
    if weights and files.get(then["model_path"], weights) != weights:
        found.pop(student, None)
        found[_STUDENT] = f"{student} is not what {then['model_path']} was"
    return found


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    found = {name: f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in {**then, **now}
             if _plain(then.get(name)) != _plain(now.get(name))}
    if _STEP in found:
        found[_STEP] += f" (--global-batch-size {then.get(_STEP)} keeps it)"
    return found


def _plain(value: Any) -> Any:
    """As JSON has it; a list of one as that one, and of none as None: some settings became lists."""
    if isinstance(value, list | tuple):
        return list(value) if len(value) > 1 else next(iter(value), None)
    return value
