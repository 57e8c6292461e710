"""The DeepSpeed configuration, built from the run's settings; a file may say more of what is DeepSpeed's own.

Nothing in a file is ignored in silence: a key is used, or agrees with what is done anyway, or is refused.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hjson
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from todi.errors import InputError
from todi.registry import did_you_mean
from todi.runtime.device import Precision
from todi.training.deepspeed_keys import (
    INITIAL_SCALE_POWER,
    OFF,
    OLDER_NAMES,
    PLAN,
    REFUSED,
    SECTIONS,
    VALUES,
    Section,
)

logger = logging.getLogger(__name__)

AUTO = "auto"  # what the Trainer of transformers fills in; here it leaves a key as if it were not there


def build_deepspeed_config(*, precision: Precision, zero_stage: int, batch_size: int, accumulation: int,
                           clip_grad: float, offload: Sequence[str] = (), ranks: int = 1,
                           override_file: str | None = None) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        precision: of the weights that compute; the optimizer keeps fp32 masters of 16-bit ones.
        offload: optimizer, param: what lies in the computer's memory, not the device's.
        ranks: how many there are, for a file that says how many samples a step has.
        override_file: a DeepSpeed JSON file, read as DeepSpeed does (comments are allowed). Its keys win over ours,
            and its "auto" values leave them.

    Raises:
        InputError: with everything that is wrong with the file, or an offload that the stage has not.
    """
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_grad,
        "bf16": {"enabled": precision.name == "bf16"},
        "fp16": {"enabled": precision.name == "fp16", "loss_scale": 0, "initial_scale_power": INITIAL_SCALE_POWER},
        "zero_optimization": {"stage": zero_stage, **{f"offload_{what}": {"device": "cpu"} for what in offload}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # we log ourselves
    }
    if override_file is not None:
        plan = {"train_batch_size": batch_size * accumulation * ranks, "train_micro_batch_size_per_gpu": batch_size,
                "gradient_accumulation_steps": accumulation}
        config = _overridden(config, plan, override_file)
    elif problems := list(_of_offload(config["zero_optimization"])):
        raise InputError([f"--offload: {problem}" for problem in problems])
    zero = config["zero_optimization"]
    if zero["stage"] == 0 and precision.name != "fp32":
        zero["stage"] = 1
        logger.info("ZeRO stage 1 in place of 0: without ZeRO, DeepSpeed's optimizer for %s begins with an update of "
                    "zero gradients, and trains differently", precision.name)
    return config


def _overridden(config: Mapping[str, Any], plan: Mapping[str, int], file: str) -> dict[str, Any]:
    """`config` with what a file says. Raises InputError with everything that is wrong with the file."""
    changed, problems, idle = dict(config), [], []
    for name, value in _read(file).items():
        if name in SECTIONS and value != AUTO:
            found = _values_of(name, SECTIONS[name], value, problems, idle)
            changed[name] = config[name] | _checked(name, SECTIONS[name], config[name], found, problems)
        elif name in plan and value not in (plan[name], AUTO):
            problems.append(f"{name} is {plan[name]}, by {PLAN[name]}; the file says {_spell(value)}")
        elif name in VALUES and value != AUTO:
            must_be, allowed = VALUES[name]
            if not allowed(value):
                problems.append(f"{name} must be {must_be}, got {_spell(value)}")
            changed[name] = value
        elif name in REFUSED and not _is_off(name, value):
            problems.append(f"{name} has no effect here; {REFUSED[name]}")
        elif name not in (*config, *plan, *REFUSED):
            problems.append(f"there is no {name}; {did_you_mean(name, [*config, *plan, *REFUSED])}")
    problems += [] if problems else _between(config, changed)
    if problems:
        raise InputError([f"--deepspeed_config {file}: {problem.rstrip('; ')}" for problem in problems])
    for key in idle:
        logger.info("%s: %s has no effect here", file, key)
    news = [f"{key} {_spell(value)}" for key, value in flat(changed).items() if flat(config).get(key) != value]
    logger.info("from %s: %s", file, ", ".join(news) or "nothing that is not so already")
    return changed


def _read(file: str) -> dict[str, Any]:
    """What a file holds, as DeepSpeed reads it. Raises InputError where it holds no object, or a key twice."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs = [(OLDER_NAMES.get(name, name), value) for name, value in pairs]
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"it says more than once {', '.join(twice)}")
        return dict(pairs)

    try:
        found = hjson.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--deepspeed_config {file}: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"--deepspeed_config {file}: expected an object, got {_spell(found)}")
    return found


def _values_of(path: str, section: Section, given: Any, problems: list[str], idle: list[str]) -> dict[str, Any]:
    """The keys of a section that are used; adds what is wrong to `problems`, and keys without effect to `idle`."""
    if not isinstance(given, dict):
        problems.append(f"{path} must be an object, {{...}}, got {_spell(given)}")
        return {}
    fields, values = section.fields, {}
    for key, value in given.items():
        if key in fields and (value == AUTO or value is None is fields[key].default):
            continue
        if key in section.sections:
            inner = _values_of(f"{path}.{key}", section.sections[key], value, problems, idle)
            values[key] = _checked(f"{path}.{key}", section.sections[key], {}, inner, problems)
        elif key in section.used:
            values[key] = value
        elif key in section.idle:
            idle.append(f"{path}.{key}")
        elif key not in fields:
            problems.append(f"there is no {path}.{key}; {did_you_mean(key, [*fields])}")
        elif not _is_default(fields[key], value):
            problems.append(f"{path}.{key} {_spell(value)} is not supported; {_newer_name(fields[key])}leave it out")
    return values


def _checked(path: str, section: Section, base: Mapping[str, Any], values: Mapping[str, Any],
             problems: list[str]) -> dict[str, Any]:
    """Values of a section in the types that DeepSpeed gives them; adds what is wrong with them to `problems`."""
    fields = section.fields
    plain = {key: value for key, value in values.items() if key not in section.sections}
    found = [f"{path}.{key} must be {'a number' if isinstance(value, bool) else 'true or false'}, got {_spell(value)}"
             for key, value in plain.items()
             if isinstance(value, bool) != (fields[key].annotation in (bool, bool | None))]
    if not found:
        try:
            read = section.model(**base | plain).model_dump(mode="json", by_alias=True)
        except ValidationError as error:
            found = [f"{'.'.join([path, *map(str, one['loc'])])}: {one['msg']}, got {_spell(one['input'])}"
                     if one["loc"] else f"{path}: {one['msg']}" for one in error.errors()]
        else:
            plain = {key: read[key] for key in plain}
            found = [f"{path}.{key} must be {must_be}, got {_spell(plain[key])}"
                     for key, (must_be, allowed) in section.limits.items() if key in plain and not allowed(plain[key])]
    problems += found
    return dict(values) | plain


def _is_default(one: FieldInfo, value: Any) -> bool:
    default = one.get_default(call_default_factory=True)
    return value == default or (default is None and value is False)


def _newer_name(one: FieldInfo) -> str:
    newer = (one.json_schema_extra or {}).get("new_param")
    return f"use {newer}, or " if newer else ""


def _between(config: Mapping[str, Any], changed: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between the keys of a file, or between them and the settings."""
    for name in ("bf16", "fp16"):
        if changed[name]["enabled"] != config[name]["enabled"]:
            yield (f"{name}.enabled is {_spell(config[name]['enabled'])}, by --precision; the file says "
                   f"{_spell(changed[name]['enabled'])}")
    yield from _of_offload(changed["zero_optimization"])


def _of_offload(zero: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a section `zero_optimization`."""
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(name) or {}).get("device", "none")
        # DeepSpeed passes over an offload that its stage has not, and the run is out of memory an hour later.
        if device != "none" and zero["stage"] < least:
            yield f"{name} needs ZeRO stage {least} or more, got {zero['stage']}"
        if device == "nvme":
            yield f"{name} to nvme is not supported, for such a run could not be resumed; use cpu"


def _is_off(name: str, value: Any) -> bool:
    """Whether a key that is not supported asks for nothing, or for what is done anyway."""
    if name == "optimizer" and isinstance(value, dict):
        params = value.get("params", {})
        return (str(value.get("type", "AdamW")).lower() in ("adam", "adamw") and set(value) <= {"type", "params"}
                and isinstance(params, dict) and all(one == AUTO for one in params.values()))
    if isinstance(value, dict) and "enabled" in value:
        value = value["enabled"]
    if isinstance(value, dict):
        return all(_is_off(key, one) for key, one in value.items())
    return value in (None, False, AUTO) or (name in OFF and value == OFF[name])


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted names."""
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _spell(value: Any) -> str:
    """As it stands in a file, on a line."""
    text = json.dumps(value, default=str)
    return text if len(text) < 80 else f"{text[:77]}..."
