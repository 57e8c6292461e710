"""How much memory it takes to read the prompts of texts that are written together, from the shape of a model alone."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from todi.models.backbone import backbone_and_head

logger = logging.getLogger(__name__)

_BY_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)  # the model's way depends on the numbers


class LiveBytes(TorchDispatchMode):
    """Counts, within its block, the bytes of the tensors that operations make, for as long as each lives.

    Attributes:
        live: bytes of those that live.
        peak: the most that there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}  # storages by their addresses; those from outside count nothing

    def __torch_dispatch__(self, operation: Any, types: Any, args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        self._note((args, kwargs), made=False)
        result = operation(*args, **kwargs or {})
        self._note(result, made=True)
        return result

    def _note(self, tensors: Any, made: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    size = storage.nbytes() if made else 0
                    self._known[storage._cdata] = weakref.ref(storage, partial(self._gone, storage._cdata, size))
                    self.live += size
                    self.peak = max(self.peak, self.live)

    def _gone(self, address: int, size: int, _: weakref.ref) -> None:
        self.live -= size
        del self._known[address]


def prefill_bytes(model: nn.Module, prompts: int, length: int, device: torch.device) -> int:
    """Bytes that reading `prompts` of `length` tokens takes besides weights, keys and values: activations at their
    fullest, and the logits of the next token.

    Args:
        model: on the meta device, LoRA-wrapped or not.
        device: where it will write.
    """
    backbone, head = backbone_and_head(model.eval())
    try:
        activations = _peak(backbone, prompts, length, device)
    except RuntimeError as error:
        if not isinstance(error, _BY_NUMBERS):  # also of an operation whose shapes torch knows for some types only
            logger.warning("the memory for reading prompts is by a rule of thumb: a forward without numbers fails (%s)",
                           str(error).partition("\n")[0])
        # as `measure_shape` has it, for one layer
        activations = 17 * prompts * length * backbone.config.hidden_size * head.weight.element_size()
    return activations + prompts * head.weight.shape[0] * head.weight.element_size()


@torch.no_grad()
def _peak(backbone: nn.Module, prompts: int, length: int, device: torch.device) -> int:
    with FakeTensorMode(), device:
        weights = {name: torch.empty(tensor.shape, dtype=tensor.dtype)
                   for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())}
        ids = torch.zeros(prompts, length, dtype=torch.long)
        mask = torch.ones_like(ids)  # without numbers it may hold padding, so attention goes the way with a mask
        with LiveBytes() as count:
            functional_call(backbone, weights, kwargs={"input_ids": ids, "attention_mask": mask, "use_cache": False})
    return count.peak
