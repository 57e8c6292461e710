"""What ranks send one another in an optimizer step, by DeepSpeed's code (compared with real runs in
tests/test_scaling.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from todi.training.gpu_memory import kept_until_backward, persistent_numbers
from todi.training.memory import Shape

# What each of n ranks in a ring sends is this times (n - 1) / n of the tensor's bytes (Patarasuk and Yuan, 2009).
_PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True)
class Collective:
    """Operations of one kind that all ranks take part in, over a whole step.

    Attributes:
        kind: all-reduce, all-gather or reduce-scatter.
        what: is sent, in words.
        payload: bytes of the whole tensors, those of all micro-batches together.
        overlapped: with forward or backward, as far as these take long enough.
    """

    kind: str
    what: str
    payload: int
    overlapped: bool

    def sent(self, ranks: int) -> int:
        """Bytes that each of `ranks` ranks sends."""
        return self.payload * _PASSES[self.kind] * (ranks - 1) // ranks


def step_traffic(shape: Shape, zero: Mapping[str, Any], micro_batches: int) -> list[Collective]:
    """Of a step of so many micro-batches. Single numbers (norms, sums of the loss) and padding are left out.

    Args:
        zero: the section zero_optimization; what it does not say is as DeepSpeed has it.
    """
    said = DeepSpeedZeroConfig(**zero)
    gradients, overlaps = shape.trained * shape.width, bool(said.overlap_comm)
    if said.stage == 3:
        return _stage_3(shape, said, micro_batches)
    times = micro_batches if said.stage == 2 else 1
    found = [Collective("all-reduce", "gradients", gradients * times, overlaps and said.stage == 2)]
    if said.stage:
        found.append(Collective("all-gather", "updated weights", gradients, overlapped=False))
    return found


def _stage_3(shape: Shape, zero: DeepSpeedZeroConfig, micro_batches: int) -> list[Collective]:
    persistent = persistent_numbers(shape, zero)
    partitioned = shape.parameters - persistent
    again = partitioned - kept_until_backward(partitioned, zero)
    numbers = {("all-gather", "weights, forward"): partitioned * micro_batches,
               ("all-gather", "weights, backward"): again * micro_batches,
               ("reduce-scatter", "gradients"): shape.trained * micro_batches}
    overlaps = bool(zero.overlap_comm)
    return [*(Collective(kind, what, count * shape.width, overlaps) for (kind, what), count in numbers.items()),
            Collective("all-gather", "small weights, updated", persistent * shape.width, overlapped=False)]


def host_bytes(shape: Shape, zero: Mapping[str, Any], micro_batches: int, ranks: int) -> int:
    """Bytes between a GPU and the computer's memory in a step, where something is offloaded: gradients out (with stage
    1 at the end alone), updated weights in, and weights in for each gathering."""
    said = DeepSpeedZeroConfig(**zero)
    optimizer, parameters = (bool(one and one.device != "none") for one in (said.offload_optimizer, said.offload_param))
    mine = shape.trained * shape.width // ranks
    found = mine * (1 + (1 if said.stage == 1 else micro_batches)) if optimizer else 0
    if parameters:
        gathered = sum(one.payload for one in _stage_3(shape, said, micro_batches) if one.kind == "all-gather")
        found += gathered // ranks
    return found


@dataclass(frozen=True)
class Links:
    """How ranks are connected.

    Attributes:
        nodes, gpus: machines, and GPUs of each.
        link: bytes a second that a GPU sends within its machine.
        network: bytes a second that a machine sends to the others.
    """

    nodes: int
    gpus: int
    link: float
    network: float

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.gpus

    def shares(self, sent: int) -> tuple[int, int]:
        """Of what a rank sends in rings over all ranks, bytes that stay in its machine, and bytes that leave it: of a
        machine's GPUs one in each ring sends to the next machine, each GPU in as many rings as the others."""
        if self.nodes == 1:
            return sent, 0
        return sent * (self.gpus - 1) // self.gpus, sent // self.gpus

    def seconds(self, sent: int) -> float:
        """That it takes at least; latency does not count."""
        within, out = self.shares(sent)
        return max(within / self.link, out * self.gpus / self.network)
