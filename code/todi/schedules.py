"""Learning-rate schedules: from a step to a factor of the peak learning rate."""

import math
from collections.abc import Callable

from todi.registry import Registry

# (step, total steps, warm-up steps, lr_min / lr) -> factor of the peak learning rate, after the warm-up
SCHEDULES: Registry[Callable[[int, int, int, float], float]] = Registry("schedule")


@SCHEDULES.register("constant")
def _constant(step: int, total: int, warmup: int, floor: float) -> float:
    return 1.0


@SCHEDULES.register("linear")
def _linear(step: int, total: int, warmup: int, floor: float) -> float:
    return floor + (1 - floor) * (1 - _progress(step, total, warmup))


@SCHEDULES.register("cosine")
def _cosine(step: int, total: int, warmup: int, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _progress(step, total, warmup)))


@SCHEDULES.register("noam")
def _noam(step: int, total: int, warmup: int, floor: float) -> float:
    """Inverse square root of the step, 1 at the end of the warm-up (Vaswani et al., 2017, section 5.3)."""
    return max(floor, math.sqrt(max(warmup, 1) / max(step, 1)))


def _progress(step: int, total: int, warmup: int) -> float:
    """0 at the end of the warm-up, 1 at the last step."""
    return min(1.0, (step - warmup) / max(1, total - warmup))
