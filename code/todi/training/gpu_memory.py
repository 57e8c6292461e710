"""What a GPU holds of a training run besides the model, its optimizer and its activations.

No GPU was at hand: what DeepSpeed allocates is read off its code (0.19's stage_1_and_2, stage3 and engine); what CUDA,
NCCL and the allocator's holes take is assumed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from todi.runtime.distributed import World
from todi.training.memory import Memory, Shape

_GIB = 2**30
CONTEXT = int(1.5 * _GIB)  # assumed: the driver, CUDA's context and the libraries' kernels
NCCL_IN_A_NODE, NCCL_BETWEEN_NODES = _GIB // 2, _GIB  # assumed: NCCL's buffers for its channels
HOLES = 0.05  # assumed: of what the allocator holds, the share that lies between blocks and fits nothing
ENGINE_BUCKET = 500_000_000  # numbers that DeepSpeed sends at a time without ZeRO


def with_what_a_gpu_adds(memory: Memory, shape: Shape, zero: Mapping[str, Any], world: World) -> Memory:
    """`memory` with DeepSpeed's buffers, NCCL's, CUDA's context, and the holes between blocks.

    Args:
        zero: the section zero_optimization.
    """
    buffers = communication_buffers(shape, zero, world.size) + reaching_over(shape, zero, world.size)
    held = memory.total - memory.base + buffers
    nccl = 0 if world.size == 1 else NCCL_IN_A_NODE if world.size == world.local_size else NCCL_BETWEEN_NODES
    return replace(memory, base=CONTEXT, nccl=nccl, buffers=buffers, holes=round(held * HOLES))


def communication_buffers(shape: Shape, zero: Mapping[str, Any], ranks: int) -> int:
    """Bytes that DeepSpeed takes for gradients on their way, and under stage 3 for weights that are gathered.

    Args:
        zero: the section zero_optimization; what it does not say is as DeepSpeed has it.
    """
    said = DeepSpeedZeroConfig(**zero)
    if ranks == 1 and said.stage in (1, 2) and not said.offload_optimizer and "contiguous_gradients" not in zero:
        return 0  # nothing is sent (training/optimizer.py)
    if said.stage == 0:
        return min(shape.trained, ENGINE_BUCKET) * shape.width  # the flat copy that is sent
    flat = min(shape.trained, said.reduce_bucket_size) * shape.width
    buckets = 0
    if said.contiguous_gradients or said.offload_optimizer:
        # allocated in full, however small the model is; the second one is filled while the first is sent
        buckets = said.reduce_bucket_size * shape.width * (2 if said.overlap_comm and said.stage < 3 else 1)
    return flat + buckets + (gathered_bytes(shape, said) if said.stage == 3 else 0)


def reaching_over(shape: Shape, zero: Mapping[str, Any], ranks: int) -> int:
    """Bytes of gradients that are none of a rank's part under stage 2: until the last micro-batch it keeps the gradient
    of every tensor that its part reaches into, whole. About the largest tensor, and at most all that is not its own."""
    said = DeepSpeedZeroConfig(**zero)
    if said.stage != 2 or said.offload_optimizer:
        return 0
    return min(max(shape.sizes, default=0), shape.trained - shape.trained // ranks) * shape.width


def gathered_bytes(shape: Shape, zero: DeepSpeedZeroConfig) -> int:
    """Of weights that are whole on a rank under stage 3, at most: small ones that always are, those kept from their
    forward to their backward, those fetched ahead, and the head or the embedding at work."""
    persistent = persistent_numbers(shape, zero)
    partitioned = shape.parameters - persistent
    at_work = kept_until_backward(partitioned, zero) + zero.prefetch_bucket_size + shape.vocabulary * shape.hidden
    return (persistent + min(partitioned, at_work)) * shape.width


def persistent_numbers(shape: Shape, zero: DeepSpeedZeroConfig) -> int:
    """How many parameters stage 3 leaves whole on each rank, for they are in small tensors."""
    small = sum(size for size in shape.sizes if size <= zero.param_persistence_threshold)
    return min(small, zero.model_persistence_threshold)


def kept_until_backward(partitioned: int, zero: DeepSpeedZeroConfig) -> int:
    """Of so many parameters, those that stage 3 does not gather again for the backward: a layer with x parameters
    behind it is used again 2 x parameters later, and what is used soon enough stays."""
    return min(partitioned, zero.max_reuse_distance // 2)
