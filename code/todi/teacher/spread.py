"""A teacher that is too large for one device: its weights are spread over the ranks, by ZeRO-3 without an optimizer.

Each rank holds a part of every weight, and the weights of a layer are gathered when it is called, which takes all
ranks. The head is whole on each of them, for the loss multiplies with it at any time.
"""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from todi.criterions import LinearHead
from todi.models.backbone import backbone_and_head
from todi.models.loading import attention_for
from todi.models.packing import use_packing
from todi.runtime.distributed import World
from todi.runtime.turns import in_turns
from todi.teacher.live import LiveTeacher

WHOLE = 100_000  # numbers of a weight up to which it is not cut; DeepSpeed's own default
_AHEAD = 50_000_000  # numbers that are gathered before they are needed; the same


class SpreadTeacher(LiveTeacher):
    """A `LiveTeacher` over all ranks, which call it in step, or as `at_own_pace` says.

    Args:
        model: in the computer's memory; its parts go to `device` one by one.
        name: of the model, for the log.
    """

    def __init__(self, model: PreTrainedModel, name: str, device: torch.device, layers: Sequence[int] = ()):
        super().__init__(model, layers)
        bias = self.head.bias
        self.head = LinearHead(self.head.weight.detach().to(device), None if bias is None else bias.detach().to(device),
                               self.head.softcap, self.head.scale)
        engine = _spread(self.backbone, device)
        weakref.finalize(self, _give_back, engine).atexit = False
        model.set_attn_implementation(attention_for(device, model.dtype, type(model)))
        self.takes_packed = use_packing(model, name)
        self.backbone.eval()

    def at_own_pace(self, world: World) -> AbstractContextManager[None]:
        return in_turns(self.backbone, self._read_a_token, world)

    @torch.no_grad()
    def _read_a_token(self) -> None:
        self.backbone(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.head.weight.device), use_cache=False)


def held_numbers(model: nn.Module, ranks: int) -> int:
    """How many numbers of the weights of `model` one of `ranks` ranks holds at most, when its teacher is spread.

    They are the head, a share of the rest, and of that what is gathered at a time: a weight, and those that come next.
    """
    backbone, head = backbone_and_head(model)
    sizes = [weight.numel() for weight in backbone.parameters()]
    return head.weight.numel() + sum(sizes) // ranks + min(sum(sizes), max(sizes) + _AHEAD)


def _spread(backbone: nn.Module, device: torch.device) -> deepspeed.DeepSpeedEngine:
    """Cuts the weights of `backbone` over the ranks, in place."""
    dtype = next(backbone.parameters()).dtype
    config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 2**31,
              "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": WHOLE,
                                    "stage3_prefetch_bucket_size": _AHEAD},
              "timers": {"throughput": {"enabled": False}},
              "bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    # one weight after the other; an engine by itself would bring the whole model to the device first
    deepspeed.zero.Init(module=backbone, config_dict_or_path=config, dtype=dtype)
    for module in backbone.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return deepspeed.initialize(model=backbone, config=config)[0]


def _give_back(engine: deepspeed.DeepSpeedEngine) -> None:
    """Empties the weights of a teacher that is gone: DeepSpeed remembers every model until the process ends."""
    engine.destroy()
    for weight in engine.module.parameters():
        weight.ds_tensor.data = weight.data = weight.new_empty(0)
