"""Cross-entropy and divergence from hidden states, a few rows of the vocabulary projection at a time.

A language model's logits are its largest tensor by far: (B, T, V). Only the rows with a label count, and no row
needs another one, so the projection, both softmaxes, the loss and the gradients of one chunk of rows are made
together and dropped before the next chunk. What outlives a chunk is as large as the gradients themselves.
The idea of a loss that makes its gradients in the forward pass is Liger-Kernel's (Hsu et al., 2024).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from todi.criterions.definitions import Divergence, compute_dtype
from todi.criterions.kernels import choose_rows
from todi.criterions.linear_head import LinearHead
from todi.criterions.rows import IGNORE_INDEX, RowFunction, RowTask, block_bytes, rows_within, slices
from todi.criterions.teacher_rows import HeadRows, TeacherRows

# Bytes of one (chunk, V) tensor. Larger chunks make larger matrix products, and fewer sums of gradients of the head;
# past these the gain is below the noise.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}


class LossSums(NamedTuple):
    """Sums over the labelled rows, each a scalar tensor; only `loss` has a gradient.

    Attributes:
        loss: (1 - kd_rate) ce + kd_rate kd.
        kd: divergence at the given temperature, nats.
        ce: cross-entropy at temperature 1, nats.
        correct: rows whose most likely token is the label.
        tokens: labelled rows.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    correct: Tensor
    tokens: Tensor


def linear_distillation_loss(student_hidden: Tensor, student_head: LinearHead,
                             teacher_hidden: Tensor | None, teacher_head: LinearHead | None, labels: Tensor, *,
                             divergence: Divergence | None, temperature: float = 1.0, kd_rate: float = 0.5,
                             label_smoothing: float = 0.0, chunk_size: int | None = None,
                             kernels: str = "auto") -> LossSums:
    """Cross-entropy and divergence of N rows, in chunks, with the gradients made on the way.

    This is `distillation_loss` of a teacher that is hidden states and a head; its arguments and errors hold here too.

    Args:
        teacher_hidden: (N, H_t); None, like `teacher_head` and `divergence`, for cross-entropy alone.
    """
    given = {teacher_hidden is not None, teacher_head is not None, divergence is not None}
    if len(given) > 1:
        raise ValueError("teacher_hidden, teacher_head and divergence go together: give all three or none")
    teacher = HeadRows(teacher_hidden, teacher_head) if divergence is not None else None
    return distillation_loss(student_hidden, student_head, teacher, labels, divergence=divergence,
                             temperature=temperature, kd_rate=kd_rate, label_smoothing=label_smoothing,
                             chunk_size=chunk_size, kernels=kernels)


def distillation_loss(student_hidden: Tensor, student_head: LinearHead, teacher: TeacherRows | None, labels: Tensor, *,
                      divergence: Divergence | None, temperature: float | Tensor = 1.0, kd_rate: float = 0.5,
                      label_smoothing: float = 0.0, chunk_size: int | None = None,
                      kernels: str = "auto") -> LossSums:
    """Cross-entropy and divergence of N rows, in chunks, with the gradients made on the way.

    Logits and everything behind them are float32 (float64 for float64 hidden states). Models of different padded
    vocabulary sizes are cropped to the common part before any softmax. Gradients reach `student_hidden` and the
    student's weight and bias where they require one; nothing is computed for a frozen head.

    Args:
        student_hidden: (N, H_s) last hidden states, after the final norm.
        teacher: what it says of these rows; None, like `divergence`, for cross-entropy alone.
        labels: (N,) token ids; a row with -100 counts for nothing, whatever either model says of it.
        temperature: T of both softmaxes of the divergence, > 0; the cross-entropy is at 1. (N,) gives each row one of
            its own, and its divergence then counts T^2 times, so that the gradients of all rows are of one scale.
        kd_rate: share of the divergence in `loss`, in [0, 1]; with one temperature for all there is no T^2 factor.
        label_smoothing: share of the target that is spread evenly over the vocabulary, in [0, 1).
        chunk_size: rows at a time; by default as many as keep a (chunk, V) tensor at 64 MiB (CPU), 256 MiB (GPU).
        kernels: what computes between the matrix products: auto, triton, compile, eager (`todi.criterions.kernels`).

    Raises:
        ValueError: arguments out of range, or a teacher without divergence or the reverse.
        InputError: `kernels` does not run here.
    """
    if (teacher is None) != (divergence is None):
        raise ValueError("teacher and divergence go together: give both or neither")
    _check_ranges(temperature, kd_rate, label_smoothing, chunk_size)
    vocabulary = len(student_head.weight)
    if teacher is not None:
        vocabulary = min(vocabulary, teacher.vocabulary)
    if torch.is_autocast_enabled(student_hidden.device.type):
        student_hidden, student_head = _autocast(student_hidden, student_head)
    grad, device = torch.is_grad_enabled(), student_hidden.device
    wants_hidden = grad and student_hidden.requires_grad
    wants_weight = grad and student_head.weight.requires_grad
    wants_bias = grad and student_head.bias is not None and student_head.bias.requires_grad
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None].to(compute_dtype(student_hidden))
    task = RowTask(divergence, temperature, 0.0 if teacher is None else kd_rate, label_smoothing, student_head.softcap,
                   student_head.scale, vocabulary, masked_entries(student_head, teacher, vocabulary),
                   sparse=teacher is not None and teacher.sparse, dtype=compute_dtype(student_hidden), device=device,
                   wants_gradients=wants_hidden or wants_weight or wants_bias)
    job = _Job(teacher, labels, task, choose_rows(kernels, student_head.weight.dtype, task),
               chunk_size or _even(len(labels), default_chunk_size(vocabulary, device,
                                                                   student_head.weight.element_size())),
               wants_hidden, wants_weight, wants_bias)
    return LossSums(*_LinearDistillation.apply(student_hidden, student_head.weight, student_head.bias, job))


def default_chunk_size(vocabulary: int, device: torch.device, width: int = 4) -> int:
    """Rows whose logits, of `width` bytes each, fill the memory budget of the device, at least 1."""
    return rows_within(_CHUNK_BYTES, vocabulary, device, width)


def _even(rows: int, most: int) -> int:
    """Rows of each of the fewest equal parts that have at most so many."""
    return -(-rows // max(1, -(-rows // most))) or 1


def peak_bytes(rows: int, vocabulary: int, hidden: int, *, width: int, head_trained: bool, teachers: int,
               chunk_size: int | None, device: torch.device) -> int:
    """Bytes that `linear_distillation_loss` adds at its peak, gradients of the hidden states and the head included.

    Args:
        rows: with a label.
        hidden: size of the student's hidden states.
        width: bytes of a number of the models.
        teachers: 0 for cross-entropy alone, more than 1 for a mean.
    """
    chunk = min(rows, chunk_size or default_chunk_size(vocabulary, device, width))
    # a mean is in fp32, like what is added to it and its log-softmax
    logits = chunk * vocabulary * (width * (1 + min(teachers, 1)) + (3 * 4 if teachers > 1 else 0))
    block = 8 * min(chunk * vocabulary * 4, block_bytes(device))
    # a 16-bit head's gradient is summed in fp32, and each chunk's share is made before it is added
    head = vocabulary * hidden * (4 if width == 4 else 4 + width) if head_trained else 0
    return logits + block + head + 2 * rows * hidden * width


@dataclass(frozen=True)
class _Job:
    """The constants of one call."""

    teacher: TeacherRows | None
    labels: Tensor
    task: RowTask
    rows: RowFunction
    chunk_size: int
    wants_hidden: bool
    wants_weight: bool
    wants_bias: bool


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        """The five sums of `LossSums`, chunk by chunk, and with them the gradients that `backward` only scales."""
        sums = hidden.new_zeros(5, dtype=job.task.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _Gradients(hidden, weight, bias, job)
            head = LinearHead(weight, bias, job.task.softcap, job.task.scale).cropped(job.task.vocabulary)
            for rows in slices(len(hidden), job.chunk_size):
                sums += _chunk(hidden, head, rows, job, grads)
        ctx.grads = grads
        outputs = tuple(total.clone() for total in sums)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were already used; a second backward needs a new forward")
        grads, ctx.grads = ctx.grads, None
        return *grads.scaled(grad_loss), None


class _Gradients:
    """Where the gradients of hidden states, weight and bias gather, chunk by chunk; None for what is frozen.

    Sums over several chunks are kept in the compute precision: bfloat16 would lose the small ones.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job):
        self.vocabulary, self.dtype = job.task.vocabulary, job.task.dtype
        self.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        self.hidden = torch.zeros_like(hidden) if job.wants_hidden else None
        self.weight = weight.new_zeros(0) if job.wants_weight else None  # until the first chunk, whose share it takes
        self.size = weight.shape
        self.bias = torch.zeros_like(bias, dtype=self.dtype) if job.wants_bias else None

    def add(self, rows: slice, d_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Adds one chunk's share: d_logits (C, V) before scale and soft-capping, in the precision of the head."""
        if self.bias is not None:
            self.bias[:self.vocabulary] += d_logits.sum(0, dtype=self.dtype)
        if self.hidden is not None:
            self.hidden[rows] = d_logits @ weight
        if self.weight is not None:
            hidden = hidden.to(weight.dtype)
            if not len(self.weight):
                self.weight = d_logits.t() @ hidden
            elif weight.dtype == self.dtype:
                self.weight.addmm_(d_logits.t(), hidden)
            else:
                self.weight = self.weight.to(self.dtype).add_(d_logits.t() @ hidden)

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        """All three times `factor`, each in the precision of what it belongs to; once, for it works in place.

        The sums are scaled before they are rounded: in float16, a small one would be 0 without the loss scale.
        """
        if self.weight is not None and len(self.weight) < self.size[0]:  # without rows, or with a longer vocabulary
            rest = self.weight.new_zeros(self.size[0] - len(self.weight), self.size[1])
            self.weight = torch.cat([self.weight, rest]) if len(self.weight) else rest
        grads = self.hidden, self.weight, self.bias
        return tuple(None if grad is None else grad.mul_(factor).to(dtype)
                     for grad, dtype in zip(grads, self.dtypes, strict=True))


def _chunk(hidden: Tensor, head: LinearHead, rows: slice, job: _Job, grads: _Gradients) -> Tensor:
    """The five sums of one chunk; its gradients go to `grads`."""
    labels, task = job.labels[rows], job.task.of(rows)
    hidden = _labelled(hidden[rows], labels)
    logits, teacher_logits = head.rows(hidden), None
    if job.teacher is not None:  # its rows without a label may hold anything: the row function drops them
        teacher_logits = job.teacher.logits(rows, task.vocabulary, task.temperature)
    sums = job.rows(logits, teacher_logits, labels, task)
    if task.wants_gradients:
        grads.add(rows, logits, hidden, head.weight)  # which have taken the place of the logits
    return sums


def masked_entries(student_head: LinearHead, teacher: TeacherRows | None, vocabulary: int) -> Tensor | None:
    """(V,) vocabulary entries that either model never gives; None where neither has a say in it."""
    student = None if student_head.bias is None else student_head.bias.isneginf()
    masks = [mask[:vocabulary] for mask in (student, None if teacher is None else teacher.masked) if mask is not None]
    return torch.stack(masks).any(0) if masks else None


def _labelled(hidden: Tensor, labels: Tensor) -> Tensor:
    """Zeros in the rows without a label: these may hold anything, and 0 * NaN is not 0 in a matrix product."""
    return hidden.masked_fill((labels == IGNORE_INDEX)[:, None], 0)


def _autocast(hidden: Tensor, head: LinearHead) -> tuple[Tensor, LinearHead]:
    """Casts what autocast would cast in a linear layer; the gradients flow back through the casts."""
    dtype = torch.get_autocast_dtype(hidden.device.type)
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), LinearHead(head.weight.to(dtype), bias, head.softcap, head.scale)


def _check_ranges(temperature: float | Tensor, kd_rate: float, label_smoothing: float,
                  chunk_size: int | None) -> None:
    if not isinstance(temperature, Tensor) and not temperature > 0:  # to ask a tensor is to wait for the device
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 <= kd_rate <= 1:
        raise ValueError(f"kd_rate must be in [0, 1], got {kd_rate}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
