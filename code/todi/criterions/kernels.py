"""Which row function runs: the fused kernel, the compiled or the eager twin, and why (`KERNELS`).

- triton: the fused kernel of `todi.criterions.triton_rows`;
- compile: the eager row function through torch.compile;
- eager: the row function as it is written in `todi.criterions.rows`, the reference;
- auto: on a CUDA device triton, once it has shown on a random block that it agrees with eager; eager elsewhere.
"""

import dataclasses
import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from todi.criterions.definitions import Divergence
from todi.criterions.rows import IGNORE_INDEX, RowFunction, RowTask, eager_block, eager_rows, in_blocks
from todi.errors import InputError

logger = logging.getLogger(__name__)

_Maker = Callable[[torch.dtype, RowTask], tuple[RowFunction, str]]
_chosen: dict[tuple, RowFunction] = {}


def choose_rows(kernels: str, dtype: torch.dtype, task: RowTask) -> RowFunction:
    """The row function for such rows, chosen and logged once for each device, precision and divergence.

    Args:
        kernels: one of `KERNELS`.
        dtype: of the student's logits.

    Raises:
        ValueError: there is no such way.
        InputError: it does not run here.
    """
    if kernels not in MAKERS:
        raise ValueError(f"kernels must be {', '.join(MAKERS)}, got {kernels!r}")
    divergence = task.divergence
    key = (kernels, dtype, task.device, task.has_temperatures,
           divergence and (divergence.definition.value, *divergence.params.items()))
    if key not in _chosen:
        _chosen[key], what = MAKERS[kernels](dtype, task)
        logger.info("loss: %s for %s, %s on %s", what, divergence.name if divergence else "cross-entropy",
                    str(dtype).removeprefix("torch."), task.device)
    return _chosen[key]


def check_kernels(kernels: str, dtype: torch.dtype, device: torch.device, divergence: Divergence | None) -> None:
    """Whether there will be a row function, before there are models. Raises InputError where there will be none."""
    if kernels == "triton":
        _triton(dtype, RowTask(divergence, 1.0, 0.0, 0.0, None, 1.0, 1, None, False, torch.float32, device, False))


def _eager(dtype: torch.dtype, task: RowTask) -> tuple[RowFunction, str]:
    return eager_rows, "the eager row function"


def _compiled(dtype: torch.dtype, task: RowTask) -> tuple[RowFunction, str]:
    if task.divergence is not None and task.divergence.definition.schedule is not None:
        return eager_rows, "the eager row function (torch.compile would start anew with each value of the schedule)"
    return compiled_rows(), "the eager row function through torch.compile"


@functools.cache
def compiled_rows() -> RowFunction:
    """The eager row function through torch.compile, for any number of rows."""
    return in_blocks(torch.compile(eager_block, dynamic=True))


def _triton(dtype: torch.dtype, task: RowTask) -> tuple[RowFunction, str]:
    problem = _why_no_triton(dtype, task)
    if problem:
        raise InputError(f"KERNELS=triton: {problem}; KERNELS=auto takes another way by itself")
    return _fused_rows(), "the fused Triton kernel"


def _auto(dtype: torch.dtype, task: RowTask) -> tuple[RowFunction, str]:
    problem = _why_no_triton(dtype, task)
    if problem:
        return eager_rows, f"the eager row function ({problem})"
    problem = disagreement(_fused_rows(), dtype, task)
    if problem:
        logger.warning("the fused Triton kernel is not used: %s", problem)
        return eager_rows, "the eager row function"
    return _fused_rows(), "the fused Triton kernel (it agrees with the eager row function on a random block)"


MAKERS: dict[str, _Maker] = {"auto": _auto, "triton": _triton, "compile": _compiled, "eager": _eager}


def _fused_rows() -> RowFunction:
    from todi.criterions.triton_rows import fused_rows  # there is no Triton where there is no GPU

    return fused_rows


def _why_no_triton(dtype: torch.dtype, task: RowTask) -> str | None:
    """Why the fused kernel cannot run; Triton's interpreter stands in for a device."""
    if task.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the device is no GPU but {task.device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from todi.criterions import triton_points, triton_rows

    if dtype not in triton_rows.DTYPES:
        return f"it has no kernel for {dtype}"
    if task.divergence is not None and task.divergence.name not in triton_points.POINTS:
        return f"it has no kernel for the divergence {task.divergence.name}"
    if task.has_temperatures:
        return "it has no kernel for rows with temperatures of their own"
    return None


def disagreement(rows: RowFunction, dtype: torch.dtype, task: RowTask) -> str | None:
    """How a row function differs from the eager one on a random block, or fails there; None when it does not."""
    task = dataclasses.replace(task, vocabulary=_CHECKED_SHAPE[1], masked=None, wants_gradients=True)
    student, teacher, labels = _random_rows(dtype, task)
    twin, twin_teacher = student.clone(), None if teacher is None else teacher.clone()
    try:
        sums = rows(student, teacher, labels, task)
    except Exception as error:  # whatever a compiler or a driver raises, training can go on without it
        return f"it failed with {type(error).__name__}: {error}"
    wanted = eager_rows(twin, twin_teacher, labels, task)
    tolerance = {"rtol": 1e-4 + 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    for name, found, expected in (("sums", sums, wanted), ("gradients", student.float(), twin.float())):
        if not torch.allclose(found, expected, **tolerance):
            return f"its {name} differ from those of the eager one by up to {(found - expected).abs().max():.2g}"
    return None


_CHECKED_SHAPE = 8, 2503


def _random_rows(dtype: torch.dtype, task: RowTask) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits and labels of a few rows; some of the labels are missing, and of the teacher's entries where they may."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(_CHECKED_SHAPE, generator=generator) for _ in range(2))
    if task.sparse:
        teacher[torch.rand(_CHECKED_SHAPE, generator=generator) < 0.5] = -torch.inf
    labels = torch.randint(_CHECKED_SHAPE[1], _CHECKED_SHAPE[:1], generator=generator)
    labels[-1] = IGNORE_INDEX
    student, teacher = (side.to(task.device, dtype) for side in (student, teacher))
    return student, None if task.divergence is None else teacher, labels.to(task.device)
