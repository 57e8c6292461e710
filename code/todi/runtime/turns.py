"""Calls of a module that need every rank, by ranks that do not have as many of them: in turns.

ZeRO-3 gathers the weights of a layer when it is called, which takes all ranks. In a turn each rank makes one call, of
its own or, when it has no more, an idle one; the turns end when no rank has any. So the ranks make equally many calls
whatever each of them has to do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from todi.runtime.distributed import World
from todi.runtime.whereabouts import HERE


@contextmanager
def in_turns(module: nn.Module, idle: Callable[[], object], world: World) -> Iterator[None]:
    """Within the block each rank may call `module` as often as it likes, and nothing else that takes all ranks.

    The end of the block waits for the ranks that still call it.

    Args:
        idle: calls `module` once, for nothing.
    """
    device = next(module.parameters()).device

    def announce(*call: object) -> None:
        world.sum(torch.ones((), device=device))

    # before DeepSpeed's own hooks, which gather
    hook = module.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    while world.size > 1 and world.sum(torch.zeros((), device=device)).item():
        idle()
        HERE.tick()
