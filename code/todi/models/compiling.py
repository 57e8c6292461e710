"""The layers of a model through torch.compile, which makes few kernels of many; in training alone."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from todi.models.backbone import layers_name

logger = logging.getLogger(__name__)


def compile_layers(model: nn.Module, name: str, backend: str = "inductor") -> None:
    """Has each transformer layer compiled when it is first called, for rows of any length.

    All layers share what was compiled for one. Attention over packed samples stays as it is on a CPU.

    Args:
        model: a causal language model, LoRA-wrapped or not, whose weights lie whole on each rank.
        name: of the model, for the log.
        backend: of torch.compile.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = base.get_submodule(layers_name(base))
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    logger.info("%s: its %d layers go through torch.compile; the first steps take longer", name, len(layers))


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within the block compiled layers run as if they were not: shapes are others there, and each would be compiled."""
    if all(module._compiled_call_impl is None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
