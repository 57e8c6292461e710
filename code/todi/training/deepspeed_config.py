"""The DeepSpeed configuration, built from the run's settings; a JSON file may override any key of it."""

import json
from pathlib import Path
from typing import Any

from todi.errors import InputError
from todi.runtime.device import Precision

# What the data plan and the model's dtype already rest on: a file may repeat these, not change them.
_OWNED = (("train_micro_batch_size_per_gpu",), ("gradient_accumulation_steps",), ("bf16", "enabled"),
          ("fp16", "enabled"))


def build_deepspeed_config(*, precision: Precision, zero_stage: int, batch_size: int, accumulation: int,
                           clip_grad: float, override_file: str | None = None) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        precision: of the weights that compute; the optimizer keeps fp32 masters of 16-bit ones.
        override_file: a DeepSpeed JSON file; its keys win, and its "auto" values leave ours.

    Raises:
        InputError: the file is not JSON, or changes the batch plan or the precision.
    """
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_grad,
        "bf16": {"enabled": precision.name == "bf16"},
        "fp16": {"enabled": precision.name == "fp16", "loss_scale": 0, "initial_scale_power": 12},
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # we log ourselves
    }
    if override_file is None:
        return config
    try:
        override = json.loads(Path(override_file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--deepspeed_config {override_file}: {error}") from None
    if not isinstance(override, dict):
        raise InputError(f"--deepspeed_config {override_file}: expected an object")
    merged = _merge(config, override)
    changed = [".".join(path) for path in _OWNED if _at(merged, path) != _at(config, path)]
    if changed:
        raise InputError(f"--deepspeed_config {override_file} changes {', '.join(changed)}; set the batch size, the "
                         "accumulation and the precision by their own options and leave them out of the file")
    _check_zero(merged["zero_optimization"], override_file)
    return merged


def _check_zero(zero: dict[str, Any], file: str) -> None:
    """DeepSpeed passes over an offload that its stage has not, and the run is out of memory an hour later."""
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        wanted = (zero.get(name) or {}).get("device", "none") != "none"
        if wanted and zero["stage"] < least:
            raise InputError(f"--deepspeed_config {file}: {name} needs ZeRO stage {least} or more, got {zero['stage']}")


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in override.items():
        if isinstance(value, dict):
            merged[key] = _merge(base.get(key) or {}, value)
        elif value != "auto":
            merged[key] = value
    return merged


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key)
    return config
