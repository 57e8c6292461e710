"""The keys of a DeepSpeed file: which are used, which have no effect, and what to use in place of the others.

    python -m todi.training.deepspeed_keys > docs/deepspeed.md     # the page that lists them
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Limit = tuple[str, Callable[[Any], bool]]  # what a value must be, and a test


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Section:
    """A section that is used.

    Attributes:
        model: DeepSpeed's declaration: which keys there are, and what they may be.
        used: keys that are handed on. The others must have their default.
        idle: keys without effect here, whatever they say.
        limits: beyond DeepSpeed's declaration, where it fails later or not at all: what a key must be, and a test.
        sections: within it.
    """

    model: type[BaseModel]
    used: frozenset[str]
    idle: frozenset[str] = frozenset()
    limits: Mapping[str, Limit] = field(default_factory=dict)
    sections: Mapping[str, "Section"] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """DeepSpeed's declaration of each key."""
        return {one.alias or name: one for name, one in self.model.model_fields.items()}


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


_LOSS_SCALE = _names("loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
                     "min_loss_scale")
_OFFLOADED_OPTIMIZER = Section(DeepSpeedZeroOffloadOptimizerConfig, _names("device pin_memory"),
                               idle=_names("nvme_path buffer_count fast_init pipeline_read pipeline_write"))
_OFFLOADED_PARAMETERS = Section(DeepSpeedZeroOffloadParamConfig, _names("device pin_memory"),
                                idle=_names("nvme_path buffer_count buffer_size max_in_cpu"))
SECTIONS = {
    "zero_optimization": Section(
        DeepSpeedZeroConfig,
        _names("stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
               "allgather_partitions allgather_bucket_size overlap_comm offload_param offload_optimizer "
               "sub_group_size round_robin_gradients memory_efficient_linear stage3_prefetch_bucket_size "
               "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
               "stage3_max_reuse_distance stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params "
               "stage3_allgather_sequential"),
        idle=_names("stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
                    "log_trace_cache_warnings enable_sanity_checks"),
        limits={"allgather_bucket_size": ("an even number", lambda value: value % 2 == 0),
                "reduce_bucket_size": ("at most 1e10, for it is allocated", lambda value: value <= 10**10)},
        sections={"offload_optimizer": _OFFLOADED_OPTIMIZER, "offload_param": _OFFLOADED_PARAMETERS}),
    "bf16": Section(DeepSpeedBF16Config, _names("enabled"), idle=_LOSS_SCALE),
    "fp16": Section(DeepSpeedFP16Config, _names("enabled") | _LOSS_SCALE, limits={
        "initial_scale_power": ("in [0, 32]", lambda value: 0 <= value <= 32),
        "hysteresis": ("at least 1", lambda value: value >= 1)}),
}
OLDER_NAMES = {"bfloat16": "bf16"}

# Single values that are used: what they must be, and a test.
VALUES: dict[str, Limit] = {
    "gradient_clipping": ("a number of at least 0", lambda value: is_number(value) and value >= 0),
    "steps_per_print": ("a whole number of at least 1", lambda value: type(value) is int and value > 0),
    "wall_clock_breakdown": ("true or false", lambda value: isinstance(value, bool)),
    "memory_breakdown": ("true or false", lambda value: isinstance(value, bool)),
    "zero_allow_untested_optimizer": ("true", lambda value: value is True),
    "zero_force_ds_cpu_optimizer": ("false", lambda value: value is False),
}
# What a resume state holds, by dotted names, and nothing changes.
FIXED = re.compile(r"(bf16|fp16)\..*")
# What it is laid out by, and put into another layout for.
LAYOUT = re.compile(r"zero_optimization\.(stage|sub_group_size|round_robin_gradients|"
                    r"stage3_(param|model)_persistence_threshold|offload_.*)")
# How a step is cut, and where that is set; a file may repeat it.
PLAN = {"train_batch_size": "--batch-size, --gradient-accumulation-steps and the number of devices",
        "train_micro_batch_size_per_gpu": "--batch-size",
        "gradient_accumulation_steps": "--gradient-accumulation-steps"}
# Where the default of a key comes from, if not from DeepSpeed.
INITIAL_SCALE_POWER = 12
_OWN_DEFAULTS = {"gradient_clipping": "--clip-grad", "zero_optimization.stage": "--zero-stage",
                 "bf16.enabled": "--precision", "fp16.enabled": "--precision",
                 "fp16.initial_scale_power": str(INITIAL_SCALE_POWER), "steps_per_print": "never",
                 "zero_allow_untested_optimizer": "true", "zero_force_ds_cpu_optimizer": "false"}
_UNUSED = "there is no such thing here; leave it out"
# What would have another effect than it has elsewhere, or none: what to do instead.
REFUSED = {
    "optimizer": "it is AdamW; set it by --lr, --weight-decay, --adam-beta1, --adam-beta2 and --adam-eps",
    "scheduler": "use --lr-scheduler, --warmup-iters and --lr-min",
    **dict.fromkeys(("amp", "torch_autocast", "data_types"), "use --precision"),
    **dict.fromkeys(("communication_data_type", "seq_parallel_communication_data_type"),
                    "gradients travel in the type of --precision"),
    **dict.fromkeys(("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
                    "gradients are divided by the tokens of the whole step"),
    "activation_checkpointing": "use --gradient-checkpointing",
    "checkpoint": "use --save-state-every",
    "managed_gradient_accumulation": "use --gradient-accumulation-steps",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "use --report-to"),
    "data_efficiency": "use --data-dir and --data-shares",
    "aio": "nothing is offloaded to nvme here",
    **dict.fromkeys(
        ("sequence_parallel_size", "tensor_parallel", "expert_parallel", "pipeline", "hybrid_engine", "compile",
         "compression_training", "quantize_training", "weight_quantization", "sparse_gradients", "sparse_attention",
         "eigenvalue", "elasticity", "autotuning", "nebula", "datastates", "curriculum_learning",
         "progressive_layer_drop", "graph_harvesting", "flops_profiler", "comms_logger", "timers", "dump_state",
         "disable_allgather", "disable_python_gc", "dataloader_drop_last", "vocabulary_size", "log_level",
         "use_data_before_expert_parallelism"), _UNUSED),
}
# Values of the above with which they are off.
OFF = {"gradient_predivide_factor": 1, "gradient_allreduce_op": "mean", "sequence_parallel_size": 1,
        "managed_gradient_accumulation": True, "seq_parallel_communication_data_type": "fp32"}


def page() -> str:
    """docs/deepspeed.md."""
    return f"""# DeepSpeed files

Made from `code/todi/training/deepspeed_keys.py` by `python -m todi.training.deepspeed_keys > docs/deepspeed.md`.

`DEEPSPEED_CONFIG` (`--deepspeed_config`) names a DeepSpeed JSON file, in which comments are allowed. Nothing in it is
ignored in silence: a key is used, or says what is done anyway, or is refused with what to use instead. `"auto"` leaves
a key as if it were not there.

## Keys that are used

"At resume" is as in [settings.md](settings.md): may change, with force, or fixed.

| key | default | must be | at resume |
| --- | --- | --- | --- |
{_rows(_used())}

{_older_names()} A default that is an option's is its value, and of `enabled` a file may say
nothing else. `offload_*.device` is cpu or none. Every other key of these sections must have DeepSpeed's default.

## Keys that have no effect, whatever they say

The log names those that a file has.

{_list(_idle())}

## How a step is cut

A file may repeat these, but only with the value that the settings give.

| key | set by |
| --- | --- |
{_rows((f"`{key}`", place) for key, place in PLAN.items())}

## Keys that are refused

Unless they are off, or (`optimizer`) ask for Adam or AdamW with every parameter `"auto"`.

| key | instead |
| --- | --- |
{_rows((f"`{key}`", instead) for key, instead in REFUSED.items())}
"""


def _used() -> Iterator[tuple[str, ...]]:
    for key, (must_be, _) in VALUES.items():
        yield _row(key, "false", must_be)
    for path, section in _all_sections():
        for key in (key for key in section.fields if key in section.used - section.sections.keys()):
            default = json.dumps(section.fields[key].get_default(call_default_factory=True), default=int)
            yield _row(f"{path}.{key}", default, section.limits[key][0] if key in section.limits else "")


def _row(key: str, default: str, must_be: str) -> tuple[str, ...]:
    at_resume = "fixed" if FIXED.fullmatch(key) else "may change" if LAYOUT.fullmatch(key) else "with force"
    return f"`{key}`", f"`{_OWN_DEFAULTS.get(key, default)}`", must_be, at_resume


def _idle() -> Iterator[str]:
    return (f"{path}.{key}" for path, section in _all_sections() for key in sorted(section.idle))


def _all_sections(sections: Mapping[str, Section] = SECTIONS, prefix: str = "") -> Iterator[tuple[str, Section]]:
    """Every section with its dotted name, those within it after it."""
    for name, section in sections.items():
        yield prefix + name, section
        yield from _all_sections(section.sections, f"{prefix}{name}.")


def _older_names() -> str:
    return " ".join(f"`{old}` is read as `{new}`." for old, new in OLDER_NAMES.items())


def _rows(rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _list(words: Iterable[str]) -> str:
    return "\n".join(f"- `{word}`" for word in words)


if __name__ == "__main__":
    print(page(), end="")
