"""The row function: what happens between the matrix products of the loss, for some rows of logits.

It has one contract and several makers (`todi.criterions.kernels`): the eager one here, in PyTorch, is the reference for
all of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from todi.criterions.definitions import MASKED_LOGIT, Divergence

IGNORE_INDEX = -100

# Bytes of one (block, V) tensor. The eager row function goes through its rows in blocks, so that the passes over the
# vocabulary stay in the cache of a CPU, and the temporaries are small.
_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class RowTask:
    """What is asked of the rows of a call.

    Attributes:
        divergence: None for cross-entropy alone.
        temperature: of both softmaxes of the divergence; the cross-entropy is at 1. Where it is (N, 1), each row has
            its own, and its divergence counts as often as the square of that says.
        kd_rate: share of the divergence in the loss; 0 without one.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        softcap: c, where the student's logits are c tanh(x / c).
        scale: s, where x = s (hidden W^T + bias).
        vocabulary: V, entries of a row.
        masked: (V,) entries that either model never gives, left out of everything; None for none.
        sparse: whether a row of the teacher may have other entries of -inf: left out of its divergence.
        dtype, device: of all that is computed.
        wants_gradients: whether gradients are made.
    """

    divergence: Divergence | None
    temperature: float | Tensor
    kd_rate: float
    label_smoothing: float
    softcap: float | None
    scale: float
    vocabulary: int
    masked: Tensor | None
    sparse: bool
    dtype: torch.dtype
    device: torch.device
    wants_gradients: bool

    @property
    def has_temperatures(self) -> bool:
        """Whether each row has its own."""
        return isinstance(self.temperature, Tensor)

    def of(self, rows: slice) -> "RowTask":
        """What is asked of some of the rows."""
        return replace(self, temperature=self.temperature[rows]) if self.has_temperatures else self

    @cached_property
    def uniform(self) -> Tensor:
        """(V,) the even distribution over the entries that are not masked."""
        allowed = torch.ones(self.vocabulary, dtype=self.dtype, device=self.device)
        if self.masked is not None:
            allowed.masked_fill_(self.masked, 0)
        return allowed / allowed.sum()


class RowFunction(Protocol):
    """What happens to some rows of logits between the matrix products."""

    def __call__(self, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, task: RowTask) -> Tensor:
        """Sums over rows, and in place their gradients.

        Args:
            logits: (n, V) of the student. Where gradients are wanted, the gradient of (1 - kd_rate) ce + kd_rate kd
                for hidden W^T + bias takes their place; else they are left in any state.
            teacher_logits: (n, V), in any precision; left in any state. None, like the divergence, for none.
            labels: (n,) token ids; a row with -100 counts for nothing and may hold anything, its gradient is 0.

        Returns:
            (5,) sums of loss, kd, ce, correct rows, labelled rows, in the precision of the task.
        """


BlockFunction = Callable[[Tensor, Tensor | None, Tensor, RowTask], tuple[Tensor, Tensor | None]]


def in_blocks(block_function: BlockFunction) -> RowFunction:
    """A row function that goes through the rows a few at a time, by a function that returns sums and gradient."""

    def row_function(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, task: RowTask) -> Tensor:
        """See `RowFunction`."""
        sums = logits.new_zeros(5, dtype=task.dtype)
        for rows in slices(len(logits), rows_within(_BLOCK_BYTES, task.vocabulary, logits.device)):
            teacher_block = None if teacher_logits is None else teacher_logits[rows]
            block_sums, d_logits = block_function(logits[rows], teacher_block, labels[rows], task.of(rows))
            sums += block_sums
            if d_logits is not None:
                logits[rows] = d_logits  # nothing reads these logits again
        return sums

    return row_function


def eager_block(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, task: RowTask,
                ) -> tuple[Tensor, Tensor | None]:
    """The sums of a few rows, and their gradient (n, V) in the precision of the task where one is wanted.

    It may overwrite both logits.
    """
    logits, counts = _finite(logits, task), labels != IGNORE_INDEX
    target = labels.where(counts, 0)[:, None]
    log_q = torch.log_softmax(logits, -1)
    ce = _cross_entropy(log_q, target, task)
    d_logits = _cross_entropy_gradient(log_q, target, task) if task.wants_gradients else None

    kd = torch.zeros_like(ce)
    if teacher_logits is not None:
        kd, d_kd = _divergence(logits, _finite(teacher_logits, task), log_q, target.squeeze(-1), task)
        if task.has_temperatures:
            kd = kd * task.temperature.squeeze(-1).square()
        if d_kd is not None and task.has_temperatures:
            d_logits.addcmul_(d_kd, task.kd_rate * task.temperature)  # T^2 / T
        elif d_kd is not None:
            d_logits.add_(d_kd, alpha=task.kd_rate / task.temperature)

    correct = logits.max(-1, keepdim=True).indices == target  # faster than argmax
    if d_logits is not None:
        d_logits = _before_head(d_logits, logits, task).masked_fill_(~counts[:, None], 0)
    kd, ce = (value.masked_fill(~counts, 0).sum() for value in (kd, ce))
    loss = (1 - task.kd_rate) * ce + task.kd_rate * kd
    return torch.stack([loss, kd, ce, (correct.squeeze(-1) & counts).sum(), counts.sum()]), d_logits


eager_rows = in_blocks(eager_block)


def rows_within(budgets: dict[str, int], vocabulary: int, device: torch.device, width: int = 4) -> int:
    """Rows of numbers of `width` bytes that fill the budget of the device, in bytes; at least 1."""
    return max(1, budgets.get(device.type, budgets["cuda"]) // (width * vocabulary))


def block_bytes(device: torch.device) -> int:
    """Bytes of a block of float32 numbers, at most."""
    return _BLOCK_BYTES.get(device.type, _BLOCK_BYTES["cuda"])


def slices(length: int, size: int) -> Iterator[slice]:
    """Of `size` each, but for the last."""
    return (slice(start, start + size) for start in range(0, length, size))


def _divergence(logits: Tensor, teacher_logits: Tensor, log_q: Tensor, labels: Tensor,
                task: RowTask) -> tuple[Tensor, Tensor | None]:
    """The divergence (rows,), and where one is wanted its gradient (rows, V) for the logits over temperature.

    What a teacher leaves out of a row, the student is not compared on there.

    Args:
        log_q: of the student at temperature 1.
        labels: (rows,) token ids.
    """
    left_out = teacher_logits.isneginf() if task.sparse else None
    if left_out is not None:
        logits, teacher_logits = (side.masked_fill(left_out, MASKED_LOGIT) for side in (logits, teacher_logits))
    if left_out is not None or task.has_temperatures or task.temperature != 1:
        log_q = torch.log_softmax(logits / task.temperature, -1)
    log_p = torch.log_softmax(teacher_logits / task.temperature, -1)
    if not task.wants_gradients or task.kd_rate == 0:
        return task.divergence.value(log_p, log_q, labels), None
    kd, d_kd = task.divergence.value_and_gradient(log_p, log_q, labels)
    return kd, d_kd if left_out is None else d_kd.masked_fill_(left_out, 0)


def _before_head(d_logits: Tensor, logits: Tensor, task: RowTask) -> Tensor:
    """The gradient for hidden W^T + bias from that for the head's logits; in place."""
    if task.softcap is not None:
        d_logits.mul_(1 - (logits / task.softcap).square_())
    if task.masked is not None:
        d_logits.masked_fill_(task.masked, 0)  # a constant has no gradient, whatever soft-capping made of -1e9
    return d_logits.mul_(task.scale)


def _finite(logits: Tensor, task: RowTask) -> Tensor:
    """In the compute precision, finite where an entry is masked; may overwrite `logits`."""
    logits = logits.to(task.dtype)
    return logits if task.masked is None else logits.masked_fill_(task.masked, MASKED_LOGIT)


def _cross_entropy(log_q: Tensor, target: Tensor, task: RowTask) -> Tensor:
    nll, smoothing = -log_q.gather(-1, target).squeeze(-1), task.label_smoothing
    return nll if smoothing == 0 else (1 - smoothing) * nll - smoothing * (log_q @ task.uniform)


def _cross_entropy_gradient(log_q: Tensor, target: Tensor, task: RowTask) -> Tensor:
    """(1 - kd_rate) (q - target distribution), (rows, V)."""
    factor, smoothing = 1 - task.kd_rate, task.label_smoothing
    gradient = log_q.exp().mul_(factor)
    if smoothing:
        gradient.sub_(task.uniform, alpha=factor * smoothing)
    return gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -factor * (1 - smoothing)))
