"""Ranks that write with a student whose weights ZeRO-3 has spread over them, each at its own pace.

A forward gathers the weights of a layer after the other, which takes all ranks. Where they fit, they are gathered once
for all forwards; else the ranks make their forwards in turns.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from todi.models.probe import evaluating
from todi.runtime.distributed import World
from todi.runtime.turns import in_turns
from todi.training.memory import available_bytes
from todi.training.student import is_partitioned

logger = logging.getLogger(__name__)

_USABLE = 0.9  # of what is free: an allocator leaves holes
_GIB = 2**30


class OwnPace:
    """Has each rank call a model as often as it likes. Every rank has one, and enters its blocks with the others.

    Args:
        room: bytes that a rank needs besides the weights: keys and values of the texts that it writes together.
    """

    def __init__(self, world: World, room: int = 0):
        self.world = world
        self.room = room
        self._told: bool | None = None

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Within the block a rank may call the causal language model `model`, and do nothing else that takes all, nor
        change its weights."""
        if not is_partitioned(model):
            yield
        elif self._fit(model):
            with gathered(model):
                yield
        else:
            with in_turns(model, lambda: _read_a_token(model), self.world):
                yield

    def _fit(self, module: nn.Module) -> bool:
        """Whether the weights fit on every rank; says so where it has not said the same before."""
        wanted = sum(weight.ds_numel * weight.element_size() for weight in _spread(module)) + self.room
        device = next(module.parameters()).device
        free = min(self.world.gather(available_bytes(device, self.world.local_size)))
        fit = wanted <= free * _USABLE
        if fit != self._told:
            logger.info("ZeRO-3 gathers the weights %s: %.2f GiB with keys and values, %.2f GiB are free",
                        "once for what the student writes" if fit else "layer by layer while the student writes",
                        wanted / _GIB, free / _GIB)
        self._told = fit
        return fit


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block the weights of `module` are whole, and its forward takes no other rank."""
    with deepspeed.zero.GatheredParameters(_spread(module)), _without_gathering(module):
        yield


def _spread(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of which a rank has a part; small ones may be whole already."""
    return [parameter for parameter in module.parameters()
            if getattr(parameter, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]


@contextmanager
def _without_gathering(module: nn.Module) -> Iterator[None]:
    """Takes DeepSpeed's hooks off: ZeRO-3 gathers by them, and would give the weights back after each layer."""
    before = [(one, name, getattr(one, name)) for one in module.modules()
              for name in ("_forward_pre_hooks", "_forward_hooks")]
    for one, name, hooks in before:
        kept = ((number, hook) for number, hook in hooks.items() if not hook.__module__.startswith("deepspeed."))
        setattr(one, name, type(hooks)(kept))
    try:
        yield
    finally:
        for one, name, hooks in before:
            setattr(one, name, hooks)


@torch.no_grad()
def _read_a_token(model: nn.Module) -> None:
    """A forward for nothing, in evaluation mode, so that it draws no random numbers."""
    device = next(model.parameters()).device
    with evaluating(model):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
