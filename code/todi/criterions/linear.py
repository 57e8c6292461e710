"""Cross-entropy and divergence from hidden states, a few rows of the vocabulary projection at a time.

A language model's logits are its largest tensor by far: (B, T, V). Only the rows with a label count, and no row
needs another one, so the projection, both softmaxes, the loss and the gradients of one chunk of rows are made
together and dropped before the next chunk. What outlives a chunk is as large as the gradients themselves.
The idea of a loss that makes its gradients in the forward pass is Liger-Kernel's (Hsu et al., 2024).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from todi.criterions.divergences import MASKED_LOGIT, Divergence, compute_dtype
from todi.criterions.linear_head import LinearHead
from todi.criterions.teacher_rows import HeadRows, TeacherRows

IGNORE_INDEX = -100

# Bytes of one (chunk, V) tensor. Larger chunks make larger matrix products; past these the gain is below the noise.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# Bytes of one (block, V) tensor. Everything but the matrix products goes through a chunk in blocks, so that the
# passes over the vocabulary stay in the cache of a CPU, and the temporaries are small.
_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


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
                             label_smoothing: float = 0.0, chunk_size: int | None = None) -> LossSums:
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
                             chunk_size=chunk_size)


def distillation_loss(student_hidden: Tensor, student_head: LinearHead, teacher: TeacherRows | None, labels: Tensor, *,
                      divergence: Divergence | None, temperature: float = 1.0, kd_rate: float = 0.5,
                      label_smoothing: float = 0.0, chunk_size: int | None = None) -> LossSums:
    """Cross-entropy and divergence of N rows, in chunks, with the gradients made on the way.

    Logits and everything behind them are float32 (float64 for float64 hidden states). Models of different padded
    vocabulary sizes are cropped to the common part before any softmax. Gradients reach `student_hidden` and the
    student's weight and bias where they require one; nothing is computed for a frozen head.

    Args:
        student_hidden: (N, H_s) last hidden states, after the final norm.
        teacher: what it says of these rows; None, like `divergence`, for cross-entropy alone.
        labels: (N,) token ids; a row with -100 counts for nothing, whatever either model says of it.
        temperature: of both softmaxes of the divergence, > 0; the cross-entropy is at 1.
        kd_rate: share of the divergence in `loss`, in [0, 1]; there is no temperature^2 factor.
        label_smoothing: share of the target that is spread evenly over the vocabulary, in [0, 1).
        chunk_size: rows at a time; by default as many as keep a (chunk, V) tensor at 64 MiB (CPU), 256 MiB (GPU).

    Raises:
        ValueError: arguments out of range, or a teacher without divergence or the reverse.
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
    job = _Job(student_head, teacher, labels, divergence, temperature, 0.0 if teacher is None else kd_rate,
               label_smoothing, vocabulary,
               chunk_size=chunk_size or default_chunk_size(vocabulary, device),
               block_size=_rows_within(_BLOCK_BYTES, vocabulary, device),
               dtype=compute_dtype(student_hidden),
               wants_hidden=grad and student_hidden.requires_grad,
               wants_weight=grad and student_head.weight.requires_grad,
               wants_bias=grad and student_head.bias is not None and student_head.bias.requires_grad)
    return LossSums(*_LinearDistillation.apply(student_hidden, student_head.weight, student_head.bias, job))


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """Rows whose float32 logits fill the memory budget of the device, at least 1."""
    return _rows_within(_CHUNK_BYTES, vocabulary, device)


def peak_bytes(rows: int, vocabulary: int, hidden: int, *, width: int, head_trained: bool, teachers: int,
               chunk_size: int | None, device: torch.device) -> int:
    """Bytes that `linear_distillation_loss` adds at its peak, gradients of the hidden states and the head included.

    Args:
        rows: with a label.
        hidden: size of the student's hidden states.
        width: bytes of a number of the models.
        teachers: 0 for cross-entropy alone, more than 1 for a mean.
    """
    chunk = min(rows, chunk_size or default_chunk_size(vocabulary, device))
    copies = 1 + min(teachers, 1) + (2 if teachers > 1 else 0)  # beside the mean, what is added and its log-softmax
    logits = chunk * vocabulary * (4 + (width if width < 4 else 0)) * copies
    block = 6 * min(chunk * vocabulary * 4, _BLOCK_BYTES.get(device.type, _BLOCK_BYTES["cuda"]))
    # a 16-bit head's gradient is summed in fp32, and each chunk's share is made before it is added
    head = vocabulary * hidden * (4 if width == 4 else 4 + width) if head_trained else 0
    return logits + block + head + 2 * rows * hidden * width


def _rows_within(budgets: dict[str, int], vocabulary: int, device: torch.device) -> int:
    return max(1, budgets.get(device.type, budgets["cuda"]) // (4 * vocabulary))


@dataclass(frozen=True)
class _Job:
    """The constants of one call."""

    student_head: LinearHead
    teacher: TeacherRows | None
    labels: Tensor
    divergence: Divergence | None
    temperature: float
    kd_rate: float
    label_smoothing: float
    vocabulary: int
    chunk_size: int
    block_size: int
    dtype: torch.dtype
    wants_hidden: bool
    wants_weight: bool
    wants_bias: bool

    @property
    def wants_gradients(self) -> bool:
        return self.wants_hidden or self.wants_weight or self.wants_bias

    @cached_property
    def masked(self) -> Tensor | None:
        """(V,) vocabulary entries that either model never gives; None where neither has a say in it."""
        student = None if self.student_head.bias is None else self.student_head.bias.isneginf()
        teacher = None if self.teacher is None else self.teacher.masked
        masks = [mask[:self.vocabulary] for mask in (student, teacher) if mask is not None]
        return torch.stack(masks).any(0) if masks else None

    @cached_property
    def uniform(self) -> Tensor:
        """(V,) the even distribution over the entries that are not masked."""
        allowed = torch.ones(self.vocabulary, dtype=self.dtype, device=self.labels.device)
        if self.masked is not None:
            allowed.masked_fill_(self.masked, 0)
        return allowed / allowed.sum()


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        """The five sums of `LossSums`, chunk by chunk, and with them the gradients that `backward` only scales."""
        sums = hidden.new_zeros(5, dtype=job.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _Gradients(hidden, weight, bias, job)
            head = LinearHead(weight, bias, job.student_head.softcap, job.student_head.scale).cropped(job.vocabulary)
            for rows in _slices(len(hidden), job.chunk_size):
                sums += _chunk(hidden, head, rows, job, grads)
        ctx.grads = grads.finished()
        outputs = tuple(total.clone() for total in sums)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were already used; a second backward needs a new forward")
        grads, ctx.grads = ctx.grads, None
        return *(grad if grad is None else grad.mul_(grad_loss) for grad in grads), None


class _Gradients:
    """Where the gradients of hidden states, weight and bias gather, chunk by chunk; None for what is frozen.

    Sums over many chunks are kept in the compute precision: bfloat16 would lose the small ones.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job):
        self.vocabulary = job.vocabulary
        self.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        self.hidden = torch.zeros_like(hidden) if job.wants_hidden else None
        self.weight = torch.zeros_like(weight, dtype=job.dtype) if job.wants_weight else None
        self.bias = torch.zeros_like(bias, dtype=job.dtype) if job.wants_bias else None

    def add(self, rows: slice, d_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Adds one chunk's share: d_logits (C, V) before scale and soft-capping, in the compute precision."""
        if self.bias is not None:
            self.bias[:self.vocabulary] += d_logits.sum(0)
        d_logits = d_logits.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = d_logits @ weight
        if self.weight is not None:
            total = self.weight[:self.vocabulary]
            if total.dtype == weight.dtype:
                total.addmm_(d_logits.t(), hidden.to(weight.dtype))
            else:
                total.add_(d_logits.t() @ hidden.to(weight.dtype))

    def finished(self) -> tuple[Tensor | None, ...]:
        grads = self.hidden, self.weight, self.bias
        return tuple(None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, self.dtypes, strict=True))


def _chunk(hidden: Tensor, head: LinearHead, rows: slice, job: _Job, grads: _Gradients) -> Tensor:
    """The five sums of one chunk; its gradients go to `grads`."""
    labels = job.labels[rows]
    hidden = _labelled(hidden[rows], labels)
    logits, teacher_logits = _masked(head(hidden), job), None
    if job.teacher is not None:  # its rows without a label may hold anything: `_block` drops what comes of them
        teacher_logits = _masked(job.teacher.logits(rows, job.vocabulary, job.temperature), job)
    sums = logits.new_zeros(5)
    for block in _slices(len(logits), job.block_size):
        block_teacher = None if teacher_logits is None else teacher_logits[block]
        block_sums, d_logits = _block(logits[block], block_teacher, labels[block], job)
        sums += block_sums
        if d_logits is not None:
            logits[block] = d_logits  # nothing reads these logits again, so their gradient takes their place
    if job.wants_gradients:
        grads.add(rows, logits, hidden, head.weight)
    return sums


def _block(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, job: _Job) -> tuple[Tensor, Tensor | None]:
    """The five sums of a few rows, and the gradient (rows, V) before scale and soft-capping where one is wanted."""
    counts = labels != IGNORE_INDEX
    target = labels.where(counts, 0)[:, None]
    log_q = torch.log_softmax(logits, -1)
    ce = _cross_entropy(log_q, target, job)
    d_logits = _cross_entropy_gradient(log_q, target, job) if job.wants_gradients else None

    kd = torch.zeros_like(ce)
    if teacher_logits is not None:
        kd, d_kd = _divergence(logits, teacher_logits, log_q, job)
        if d_kd is not None:
            d_logits.add_(d_kd, alpha=job.kd_rate / job.temperature)

    correct = logits.argmax(-1, keepdim=True) == target
    if d_logits is not None:
        d_logits = _before_head(d_logits, logits, job).masked_fill_(~counts[:, None], 0)
    kd, ce = (value.masked_fill(~counts, 0).sum() for value in (kd, ce))
    loss = (1 - job.kd_rate) * ce + job.kd_rate * kd
    return torch.stack([loss, kd, ce, (correct.squeeze(-1) & counts).sum(), counts.sum()]), d_logits


def _divergence(logits: Tensor, teacher_logits: Tensor, log_q: Tensor, job: _Job) -> tuple[Tensor, Tensor | None]:
    """The divergence (rows,), and where one is wanted its gradient (rows, V) for the logits over temperature.

    What a teacher leaves out of a row, the student is not compared on there.

    Args:
        log_q: of the student at temperature 1.
    """
    left_out = teacher_logits.isneginf() if job.teacher.sparse else None
    if left_out is not None:
        logits, teacher_logits = (side.masked_fill(left_out, MASKED_LOGIT) for side in (logits, teacher_logits))
    if left_out is not None or job.temperature != 1:
        log_q = torch.log_softmax(logits / job.temperature, -1)
    log_p = torch.log_softmax(teacher_logits / job.temperature, -1)
    if not job.wants_gradients or job.kd_rate == 0:
        return job.divergence.value(log_p, log_q), None
    kd, d_kd = job.divergence.value_and_gradient(log_p, log_q)
    return kd, d_kd if left_out is None else d_kd.masked_fill_(left_out, 0)


def _before_head(d_logits: Tensor, logits: Tensor, job: _Job) -> Tensor:
    """The gradient for hidden W^T + bias from that for the head's logits; in place."""
    if job.student_head.softcap is not None:
        d_logits.mul_(1 - (logits / job.student_head.softcap).square_())
    if job.masked is not None:
        d_logits.masked_fill_(job.masked, 0)  # a constant has no gradient, whatever soft-capping made of -1e9
    return d_logits.mul_(job.student_head.scale)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _labelled(hidden: Tensor, labels: Tensor) -> Tensor:
    """Zeros in the rows without a label: these may hold anything, and 0 * NaN is not 0 in a matrix product."""
    return hidden.masked_fill((labels == IGNORE_INDEX)[:, None], 0)


def _masked(logits: Tensor, job: _Job) -> Tensor:
    """In the compute precision, finite where an entry is masked; may overwrite `logits`."""
    logits = logits.to(job.dtype)
    return logits if job.masked is None else logits.masked_fill_(job.masked, MASKED_LOGIT)


def _cross_entropy(log_q: Tensor, target: Tensor, job: _Job) -> Tensor:
    nll, smoothing = -log_q.gather(-1, target).squeeze(-1), job.label_smoothing
    return nll if smoothing == 0 else (1 - smoothing) * nll - smoothing * (log_q @ job.uniform)


def _cross_entropy_gradient(log_q: Tensor, target: Tensor, job: _Job) -> Tensor:
    """(1 - kd_rate) (q - target distribution), (rows, V)."""
    factor, smoothing = 1 - job.kd_rate, job.label_smoothing
    gradient = log_q.exp().mul_(factor)
    if smoothing:
        gradient.sub_(job.uniform, alpha=factor * smoothing)
    return gradient.scatter_add_(-1, target, gradient.new_full(target.shape, -factor * (1 - smoothing)))


def _autocast(hidden: Tensor, head: LinearHead) -> tuple[Tensor, LinearHead]:
    """Casts what autocast would cast in a linear layer; the gradients flow back through the casts."""
    dtype = torch.get_autocast_dtype(hidden.device.type)
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), LinearHead(head.weight.to(dtype), bias, head.softcap, head.scale)


def _check_ranges(temperature: float, kd_rate: float, label_smoothing: float, chunk_size: int | None) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 <= kd_rate <= 1:
        raise ValueError(f"kd_rate must be in [0, 1], got {kd_rate}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
