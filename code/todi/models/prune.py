"""Makes a student by depth pruning: a copy of a model with only some of its layers.

    python -m todi.models.prune --model-path TEACHER --keep-layers 0 1 2 8 11 23 24 28 29 --save-dir STUDENT
"""

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from todi.errors import InputError, run_main
from todi.models.loading import load_config, load_model, load_tokenizer
from todi.options import option, parse
from todi.runtime.logs import set_up_logging

logger = logging.getLogger("todi.models.prune")


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
    layers = load_config(config.model_path).num_hidden_layers
    bad = [i for i in config.keep_layers if not 0 <= i < layers]
    if bad or list(config.keep_layers) != sorted(set(config.keep_layers)):
        raise InputError(f"--keep-layers must ascend within 0 to {layers - 1}, got {config.keep_layers}")
    model = load_model(config.model_path, torch.float32, torch.device("cpu"))
    student = keep_layers(model, config.keep_layers)
    student.save_pretrained(folder)
    load_tokenizer(config.model_path).save_pretrained(folder)
    logger.info("%s: %d of %d layers, %.1f of %.1f M parameters", folder, len(config.keep_layers), layers,
                student.num_parameters() / 1e6, model.num_parameters() / 1e6)


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new model with the given layers of `model`, in their order; embeddings, norm and head are copied too."""
    config = copy.deepcopy(model.config)
    prefix = _layers_name(model, config.num_hidden_layers)
    if getattr(config, "layer_types", None):  # sliding or full attention, per layer
        config.layer_types = [config.layer_types[i] for i in layers]
    config.num_hidden_layers = len(layers)
    renumbered = {str(old): str(new) for new, old in enumerate(layers)}
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    weights = {}
    for name, weight in model.state_dict().items():
        layer = pattern.match(name)
        if layer is None:
            weights[name] = weight
        elif layer[1] in renumbered:
            weights[f"{prefix}.{renumbered[layer[1]]}.{name[layer.end():]}"] = weight
    student = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    student.load_state_dict(weights)
    student.generation_config = model.generation_config
    return student


def _layers_name(model: PreTrainedModel, count: int) -> str:
    """The dotted name of the list of transformer layers, such as `model.layers` or `transformer.h`."""
    names = [name for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == count]
    if not names:
        raise InputError(f"{type(model).__name__} has no list of {count} layers to prune")
    return min(names, key=len)


if __name__ == "__main__":
    run_main(main)
