"""LoRA adapters: new ones, and saved ones, of which every tensor must have its place in the model."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.pytorch_utils import Conv1D

from todi.errors import InputError
from todi.models.families import Family
from todi.models.loading import empty_model, refuse_pointers, refusing
from todi.registry import did_you_mean

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the head

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_Words = list[str] | str | None
_Rank = Annotated[int, Field(ge=1)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]


class _Settings(BaseModel):
    """What an adapter_config.json may set. Whatever else it sets alters what is computed in a way that no test here
    covers; what is none of a field's type, peft takes for something else, such as the text "false" for yes."""

    model_config = ConfigDict(strict=True)

    r: _Rank = 8
    lora_alpha: _Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: _Words = None
    exclude_modules: _Words = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: _Words = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: Any = True


_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # others, as PiSSA, change the base model's weights too
_LARGEST = 65_504  # of a weight, which any precision can hold
_NOTES = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
          "runtime_config", "task_type"}  # change nothing here


# ---- a new adapter

def add_lora(model: PreTrainedModel, family: Family, rank: int, alpha: float, dropout: float,
             targets: Sequence[str] = ()) -> PeftModel:
    """Wraps `model` with a new, trainable LoRA adapter.

    The adapter's weights are kept in the model's dtype, so that DeepSpeed sees a single one.

    Args:
        targets: names of the linear layers that get one, or `ALL_LINEAR`; chosen by `choose_targets` when not given.
    """
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout,
                      target_modules=choose_targets(model.config, family, targets))
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def choose_targets(config: PretrainedConfig, family: Family, targets: Sequence[str] = ()) -> list[str] | str:
    """`targets`, or else those of the family, or else peft's for the architecture, or else all linear layers."""
    chosen = list(targets or family.lora_targets or ()) or PEFT_TARGETS.get(config.model_type, ALL_LINEAR)
    return ALL_LINEAR if chosen == [ALL_LINEAR] else chosen


def check_lora(config: PretrainedConfig, family: Family, targets: Sequence[str], model_path: str,
               trust_remote_code: bool = False) -> None:
    """Whether a new adapter can be put on these layers of a model of this configuration.

    Raises:
        InputError: there is no such layer, or none that LoRA can be trained on.
    """
    model = empty_model(config, trust_remote_code)
    allowed = [ALL_LINEAR, *_linear_layers(model)]
    for name in targets:
        if name not in allowed:
            raise InputError(f"--peft-lora-targets: {model_path} has no linear layer {name!r}; "
                             f"{did_you_mean(name, allowed)}allowed: {', '.join(allowed)}")
    if ALL_LINEAR in targets and len(targets) > 1:
        raise InputError(f"--peft-lora-targets: {ALL_LINEAR} stands alone, got {' '.join(targets)}")
    with refusing(f"LoRA on {choose_targets(config, family, targets)} of {model_path}"):
        adapted = add_lora(model, family, 1, 1, 0.0, targets)
    _check_head(adapted, f"LoRA on {model_path}", trained=True)
    logger.info("LoRA on %s of %s", ", ".join(sorted(_adapted_layers(adapted))), model_path)


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of the linear layers, each once, but for the head, whose weight the loss itself reads."""
    head = model.get_output_embeddings()
    return list(dict.fromkeys(name.rpartition(".")[2] for name, module in model.named_modules()
                              if isinstance(module, (nn.Linear, Conv1D)) and module is not head))


def _adapted_layers(model: PeftModel) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


# ---- a saved adapter

def find_adapter(path: str) -> Path:
    """The folder of a LoRA adapter. Raises InputError when `path` is none."""
    if not (Path(path) / "adapter_config.json").is_file():
        raise InputError(f"no LoRA adapter at {path}: adapter_config.json is not there")
    return Path(path)


def base_of(adapter: str) -> str:
    """The model that a LoRA adapter was trained on. Raises InputError when the adapter does not say."""
    file = find_adapter(adapter) / "adapter_config.json"
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{file} is not a JSON object") from None
    if not (base and isinstance(base, str)):
        raise InputError(f"{file} does not name the base model; give it as --model-path")
    return base


def load_adapter(model: PreTrainedModel, path: str, trained: bool = True) -> PeftModel:
    """`model` with the saved LoRA adapter at `path`, in the model's dtype.

    Raises:
        InputError: it cannot be read, or has tensors that no layer uses. `check_adapter` finds more.
    """
    config = _read_config(path)
    config.inference_mode = not trained
    tensors = _read_tensors(path, "cpu")
    with refusing(f"the LoRA adapter at {path} does not fit {model.name_or_path}"):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        unused = set_peft_model_state_dict(adapted, tensors).unexpected_keys
    if unused:
        raise InputError(f"the LoRA adapter at {path} has tensors that {model.name_or_path} does not use, the first: "
                         f"{min(unused)}")
    return adapted


def merge_adapter(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """`model` with the saved LoRA adapter at `path` merged into its weights. Raises InputError as `load_adapter`."""
    return load_adapter(model, path, trained=False).merge_and_unload()


def adapter_outline(path: str, model: PreTrainedModel) -> PeftModel:
    """An empty model with the layers of the saved adapter at `path`: shapes without numbers.

    Raises:
        InputError: there is no adapter, it is not LoRA, or it is for layers that the model has not.
    """
    config = _read_config(path)
    with refusing(f"the LoRA adapter at {path} does not fit a {type(model).__name__}"):
        return get_peft_model(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)


def check_adapter(path: str, config: PretrainedConfig, model_path: str, trust_remote_code: bool = False,
                  trained: bool = False) -> None:
    """Whether a model of this configuration has a place for each tensor of the saved adapter at `path`, and each place
    has its tensor. Reads no weights of the model.

    Args:
        trained: the adapter will be gone on with, not merged.

    Raises:
        InputError: there is no adapter, it was made for another model, is not whole, or is of another kind.
    """
    outline = adapter_outline(path, empty_model(config, trust_remote_code))
    _check_head(outline, f"the LoRA adapter at {path}", trained)
    with refusing(f"cannot read the LoRA adapter at {path}"):
        tensors = _read_tensors(path, "cpu")
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted, embeddings = (_shapes(outline, save_embedding_layers=also) for also in (False, True))
    for name in sorted(given.keys() & embeddings.keys()):
        if given[name] != embeddings[name]:
            reason = ("is empty (weights that ZeRO-3 had not gathered?)" if 0 in given[name]
                      else f"was made for another model than {model_path}")
            raise InputError(f"the LoRA adapter at {path} {reason}: its {name} is {given[name]}, the model takes "
                             f"{embeddings[name]}")
    copies = given.keys() & embeddings.keys() - wanted.keys()  # of the base's embeddings; peft adds them at times
    if copies and trained:
        raise InputError(f"the LoRA adapter at {path} has embeddings besides ({min(copies)}), which going on with it "
                         "would not keep; merge it into its base first")
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - embeddings.keys())
    if missing or unknown:
        lacking = f"lacks {len(missing)} of {len(wanted)} tensors, the first: {missing[0]}" if missing else ""
        beyond = f"has {len(unknown)} that have no place in {model_path}, the first: {unknown[0]}" if unknown else ""
        raise InputError(f"the LoRA adapter at {path} {' and '.join(filter(None, (lacking, beyond)))}")
    _check_numbers(path, tensors)
    lora, layers = outline.active_peft_config, _adapted_layers(outline)
    if not trained:
        with refusing(f"the LoRA adapter at {path} cannot be merged into {model_path}"):
            outline.merge_and_unload()
    logger.info("LoRA adapter %s: rank %d, alpha %g, on %s%s", path, lora.r, lora.lora_alpha,
                ", ".join(sorted(layers)),
                f" ({_FILES[1]}: tensors are read, nothing else in it is)" if _weights_file(path).name == _FILES[1]
                else "")


def _check_numbers(path: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            raise InputError(f"the LoRA adapter at {path}: its {name} is of {tensor.dtype}; a weight has a fraction")
        if not tensor.float().abs().max() <= _LARGEST:
            raise InputError(f"the LoRA adapter at {path}: its {name} has numbers that are not finite, or beyond "
                             f"{_LARGEST:g}; it is damaged")


def _read_config(path: str) -> LoraConfig:
    file = find_adapter(path) / "adapter_config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        kind = given.get("peft_type")
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{file} is not a JSON object") from None
    if kind != "LORA":
        raise InputError(f"the adapter at {path} is of the kind {kind}, supported: LORA")
    if given.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(f"the LoRA adapter at {path} is for {given['task_type']}, supported: CAUSAL_LM")
    usual = vars(LoraConfig())
    further = sorted(name for name, value in given.items()
                     if value and value != usual.get(name) and name not in {*_Settings.model_fields, *_NOTES})
    if given.get("init_lora_weights", True) not in _PLAIN_STARTS:
        further.append("init_lora_weights")
    if further:
        raise InputError(f"the LoRA adapter at {path} is of a kind that is not supported: it sets "
                         + ", ".join(f"{name}={json.dumps(given[name])}" for name in further))
    try:
        settings = _Settings(**{name: value for name, value in given.items() if name in _Settings.model_fields})
    except ValidationError as error:
        wrong = {one["loc"][0]: one["msg"] for one in error.errors()}
        raise InputError(f"{file}: {name}: {message}, got {json.dumps(given[name])}"
                         for name, message in wrong.items()) from None
    with refusing(str(file)):
        return LoraConfig(task_type=given.get("task_type"), **settings.model_dump(exclude_none=True))


def _weights_file(path: str) -> Path:
    file = next((find_adapter(path) / name for name in _FILES if (Path(path) / name).is_file()), None)
    if file is None:
        raise InputError(f"no LoRA adapter at {path}: neither {' nor '.join(_FILES)} is there")
    return file


def _read_tensors(path: str, device: str) -> dict[str, Tensor]:
    file = _weights_file(path)
    refuse_pointers(file.parent)
    with refusing(f"cannot read {file}"):
        return load_state_dict(file, map_location=device)


def _shapes(model: PeftModel, save_embedding_layers: bool) -> dict[str, tuple[int, ...]]:
    """Of each tensor that peft would save."""
    return {name: tuple(tensor.shape) for name, tensor in
            get_peft_model_state_dict(model, save_embedding_layers=save_embedding_layers).items()}


def _check_head(model: PeftModel, name: str, trained: bool) -> None:
    """Refuses LoRA on a head whose own weight the loss reads, and on a tensor that two layers share."""
    head, embeddings = (isinstance(layer, BaseTunerLayer)
                        for layer in (model.get_output_embeddings(), model.get_input_embeddings()))
    if trained and head:
        raise InputError(f"{name} adapts the head, which cannot be trained: the loss reads the head's own weight. "
                         "Train other layers (--peft-lora-targets), or a copy of the head (peft's modules_to_save)")
    if model.config.tie_word_embeddings and (head or embeddings):
        raise InputError(f"{name} adapts {'the head' if head else 'the embeddings'}, and the model's head and "
                         "embeddings are one tensor: merged into it, the adapter would change both")
