"""Makes a student by depth pruning: a copy of a model with only some of its layers.

    python -m todi.models.prune --model-path TEACHER --keep-layers 0 1 2 8 11 23 24 28 29 --save-dir STUDENT
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from todi.errors import InputError, run_main
from todi.models.backbone import layers_name
from todi.models.loading import check_weights, empty_model, load_config, load_model, load_tokenizer, refusing
from todi.options import option, parse
from todi.runtime.logs import set_up_logging

logger = logging.getLogger("todi.models.prune")

_MAY_DIFFER = {"layer_idx", "layer_id", "training"}  # of two layers that compute the same


@dataclass(frozen=True)
class PruneConfig:
    """Makes a student by keeping some of a model's layers."""

    model_path: str = option("", "the model to prune")
    keep_layers: tuple[int, ...] = option((), "indices of the layers that stay, ascending")
    save_dir: str = option("", "folder of the pruned model")


def main() -> None:
    """Prune one model; nothing to do when the result is there."""
    config = parse(PruneConfig, prog="python -m todi.models.prune")
    set_up_logging(is_main=True)
    folder = Path(config.save_dir)
    if not (config.model_path and config.save_dir and config.keep_layers):
        raise InputError("--model-path, --keep-layers and --save-dir are required")
    if (folder / "config.json").is_file():
        logger.info("%s is already there", folder)
        return
    model_config = load_config(config.model_path)
    layers = layer_count(model_config)
    bad = [i for i in config.keep_layers if not 0 <= i < layers]
    if bad or list(config.keep_layers) != sorted(set(config.keep_layers)):
        raise InputError(f"--keep-layers must ascend within 0 to {layers - 1}, got {config.keep_layers}")
    check_weights(config.model_path)
    keep_layers(empty_model(model_config), config.keep_layers)  # whether they can be, before weights are read
    model = load_model(config.model_path, torch.float32, torch.device("cpu"))
    student = keep_layers(model, config.keep_layers)
    student.save_pretrained(folder)
    load_tokenizer(config.model_path).save_pretrained(folder)
    logger.info("%s: %d of %d layers, %.1f of %.1f M parameters", folder, len(config.keep_layers), layers,
                student.num_parameters() / 1e6, model.num_parameters() / 1e6)


def layer_count(config: PretrainedConfig) -> int:
    """Layers of a model's one stack. Raises InputError where its configuration tells of none."""
    count = getattr(config, "num_hidden_layers", None)
    if count is None:
        raise InputError(f"a {config.model_type} model cannot be pruned: its layers are not one stack")
    return count


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new model with the given layers of `model`, in their order; embeddings, norm and head are copied too.

    Raises:
        InputError: a configuration cannot say what such a model is. Of a model without numbers (on the meta device)
            only its form is known.
    """
    prefix = layers_name(model)
    renumbered = {str(old): str(new) for new, old in enumerate(layers)}
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    weights = {}
    for name, weight in model.state_dict().items():
        layer = pattern.match(name)
        if layer is None:
            weights[name] = weight
        elif layer[1] in renumbered:
            weights[f"{prefix}.{renumbered[layer[1]]}.{name[layer.end():]}"] = weight
    with refusing(f"layers {' '.join(map(str, layers))} of a {type(model).__name__} make no model"), model.device:
        student = AutoModelForCausalLM.from_config(_config_of_some(model.config, layers), dtype=model.dtype).eval()
        student.load_state_dict(weights)
    student.generation_config = model.generation_config
    _check_layers(model.get_submodule(prefix), student.get_submodule(prefix), layers)
    if model.device.type != "meta":
        _check_logits(model, model.get_submodule(prefix), student, layers)
    return student


def _config_of_some(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """`config` with what it says of single layers cut down to `layers`: lists with an entry for each layer, such as
    `layer_types`, and lists of the layers' numbers, such as `mlp_only_layers`."""
    count, settings = config.num_hidden_layers, config.to_dict()
    for name, value in settings.items():
        if "layer" not in name or not isinstance(value, list) or not value:
            continue
        if all(type(i) is int and i < count for i in value) and value == sorted(set(value)):
            settings[name] = [new for new, old in enumerate(layers) if old in value]
        elif len(value) == count:
            settings[name] = [value[i] for i in layers]
    settings[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    return type(config).from_dict(settings)  # as it will be read from the student's folder


def _check_layers(ours: nn.ModuleList, student: nn.ModuleList, layers: Sequence[int]) -> None:
    """Raises InputError where a layer of the student is made otherwise than the one that it comes from."""
    for new, old in enumerate(layers):
        for (name, one), other in zip(ours[old].named_modules(), student[new].modules(), strict=True):
            differing = [setting for setting, value in _settings(one).items() if _settings(other).get(setting) != value]
            if differing or type(one) is not type(other):
                raise InputError(f"layer {old} cannot be layer {new} of another model: its configuration has no way to "
                                 f"keep {name or 'the layer'}'s {', '.join(differing) or type(one).__name__}")


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and name not in _MAY_DIFFER}


@torch.no_grad()
def _check_logits(model: PreTrainedModel, stack: nn.ModuleList, student: PreTrainedModel,
                  layers: Sequence[int]) -> None:
    """Raises InputError unless the student computes what `model` does when its other layers hand on what they get."""
    ids = torch.arange(3, 43, device=model.device)[None]
    hooks = [layer.register_forward_hook(_hand_on, with_kwargs=True)
             for number, layer in enumerate(stack) if number not in layers]
    with refusing(f"the {type(model).__name__} cannot be run"):
        expected = model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        error = ((student(input_ids=ids, use_cache=False).logits - expected).norm() / expected.norm()).item()
    if not error < 1e-3:
        raise InputError(f"a {type(model).__name__} cannot be pruned: without the other layers, those that stay "
                         f"compute something else (logits differ by {error:.0%})")


def _hand_on(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


if __name__ == "__main__":
    run_main(main)
