"""How much memory a training run will need on a device, from the shapes of its models alone."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from todi.models.backbone import backbone_and_head
from todi.runtime.logs import peak_resident_bytes

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what it reports is dealt with here

_PROC = Path("/proc")
_FP32, _ADAM = 4, 8  # bytes of a number, and of Adam's two moments of it
# Batches of many lengths leave holes in the heap of a CPU process: measured, as a share of activations and loss, by
# bytes of a number (benchmarks/README.md).
_LEFT_BEHIND = {4: 0.25, 2: 0.75}


@dataclass(frozen=True)
class Shape:
    """What decides the memory of a model.

    Attributes:
        parameters, trained: numbers of them.
        width: of one number, bytes.
        activations: bytes that a forward of the wanted batch keeps for the backward.
        vocabulary, hidden: of the head's weight.
        head_trained: whether the head's weight has a gradient.
        sizes: numbers of each tensor of parameters.
        prefill: bytes that it takes to read prompts, where it writes: those that are read together, with their keys
            and values before these are put to the others; else 0.
    """

    parameters: int
    trained: int
    width: int
    activations: int
    vocabulary: int
    hidden: int
    head_trained: bool
    sizes: tuple[int, ...] = ()
    prefill: int = 0


@dataclass(frozen=True)
class State:
    """Bytes of what a step needs for its parameters; `step` exists during the optimizer's step alone."""

    weights: int
    gradients: int
    optimizer: int
    step: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device when it is fullest, by what they are for.

    Attributes:
        base: libraries; on a CPU, what the process holds already.
        working: activations and the loss in the forward, or the copies that the optimizer's step makes; both on a CPU.
        offloaded: in the computer's memory, and not on the device.
        buffers: of DeepSpeed, for gradients and weights on their way; on a GPU, as the two below.
        nccl: of NCCL.
        holes: between the blocks of the allocator.
    """

    base: int
    teacher: int
    weights: int
    gradients: int
    optimizer: int
    working: int
    offloaded: int = 0
    buffers: int = 0
    nccl: int = 0
    holes: int = 0

    @property
    def total(self) -> int:
        return (self.base + self.teacher + self.weights + self.gradients + self.optimizer + self.working
                + self.buffers + self.nccl + self.holes)


def measure_shape(model: nn.Module, samples: int, length: int, device: torch.device,
                  checkpointing: bool = False) -> Shape:
    """Runs a batch through a model without numbers and counts what autograd would keep.

    Args:
        model: on the meta device.
        samples, length: the batch, (samples, length) tokens.
        device: on which it will train.
        checkpointing: keep the input of each layer only, and of one layer at a time the rest.
    """
    backbone, head = backbone_and_head(model.train())
    layers, hidden = backbone.config.num_hidden_layers, samples * length * backbone.config.hidden_size
    width = head.weight.element_size()
    try:
        activations = _kept_bytes(backbone, samples, length, device)
    except RuntimeError:  # a way that depends on the numbers, as in a mixture of experts
        # 17 for each of the layer's inputs, as in Korthikanti et al., 2022, table 2
        activations = layers * 17 * hidden * width
    if checkpointing:
        activations = activations // layers + layers * hidden * width
    parameters = list(model.parameters())
    return Shape(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad), width,
                 activations, *head.weight.shape, head.weight.requires_grad, tuple(p.numel() for p in parameters))


def _kept_bytes(backbone: nn.Module, samples: int, length: int, device: torch.device) -> int:
    """Bytes that autograd keeps of a forward, weights apart."""
    with FakeTensorMode(), device:
        weights = {name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
                   for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())}
        owned = {tensor.untyped_storage()._cdata for tensor in weights.values()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in owned:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        ids = torch.zeros(samples, length, dtype=torch.long)
        mask = torch.ones_like(ids)  # without numbers it may hold padding, so attention goes the way with a mask
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            functional_call(backbone, weights, kwargs={"input_ids": ids, "attention_mask": mask, "use_cache": False})
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def training_state(shape: Shape, stage: int, ranks: int) -> State:
    """What one of `ranks` ranks holds of the student under a ZeRO stage (Rajbhandari et al., 2020, figure 1).

    DeepSpeed keeps fp32 masters of the weights, except without ZeRO in fp32.
    """
    gradients = shape.trained * shape.width
    if stage == 0 and shape.width == _FP32:
        return State(shape.parameters * shape.width, gradients, shape.trained * _ADAM, 0)
    mine = ranks if stage else 1
    optimizer = shape.trained * (_FP32 + _ADAM) // mine
    step = shape.trained * _FP32 // mine
    weights = shape.parameters * shape.width // (ranks if stage == 3 else 1)
    return State(weights, gradients // (ranks if stage >= 2 else 1), optimizer, step)


def offload(state: State, zero: Mapping[str, Any]) -> tuple[State, int]:
    """What stays on a GPU where a DeepSpeed file offloads to the CPU, and the bytes that go there.

    From ZeRO stage 2 on gradients follow the optimizer as they are made.

    Args:
        zero: the section zero_optimization.
    """
    optimizer, parameters = (zero.get(name, {}).get("device", "none") != "none"
                             for name in ("offload_optimizer", "offload_param"))
    moved = (state.optimizer + state.step) * optimizer + state.weights * parameters
    if optimizer:
        state = replace(state, gradients=state.gradients if zero["stage"] < 2 else 0, optimizer=0, step=0)
    if parameters:
        state = replace(state, weights=0)
    return state, moved


def peak(state: State, *, forward: int, accumulates: bool, teacher: int, base: int) -> Memory:
    """The fuller of two moments on a GPU: the end of the forward, and the optimizer's step.

    Args:
        forward: bytes of activations and loss.
        accumulates: gradients of earlier micro-batches are there while a later one is in its forward.
    """
    gradients = state.gradients if accumulates else 0
    if forward + gradients >= state.step + state.gradients:
        return Memory(base, teacher, state.weights, gradients, state.optimizer, forward)
    return Memory(base, teacher, state.weights, state.gradients, state.optimizer, state.step)


def peak_on_cpu(state: State, *, forward: int, width: int, teacher: int, base: int) -> Memory:
    """The whole process on a CPU, where C's allocator keeps what was freed, so that both moments add up.

    Args:
        width: bytes of a number of the student.
    """
    left_behind = round(forward * _LEFT_BEHIND[width])
    return Memory(base, teacher, state.weights, state.gradients, state.optimizer, forward + left_behind + state.step)


def available_bytes(device: torch.device, processes: int) -> int:
    """What one of `processes` processes of this machine can still take on its device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, for itself
        return torch.cuda.mem_get_info(device)[0] + unused
    free = _proc("meminfo", "MemAvailable") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // processes


def resident_bytes() -> int:
    """What this process holds in RAM."""
    return _proc("self/status", "VmRSS") or peak_resident_bytes()


def _proc(file: str, name: str) -> int | None:
    """Bytes, as Linux says; None where there is no /proc, as on macOS."""
    if not (_PROC / file).is_file():
        return None
    line = next(line for line in (_PROC / file).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
