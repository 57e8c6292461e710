"""The row function as one Triton kernel: a program for each row, three passes over the vocabulary, no temporaries.

Pass 1 makes the log-sum-exps, pass 2 the divergence and the sum of h = d value / d log q, pass 3 the gradient, written
over the student's logits. Each pass reads both models' logits, so that an entry of two bytes costs 14 bytes of traffic.
A divergence is a point function (`todi.criterions.triton_points`). Everything is float32 behind the loads. Import this
module only where it is used: Triton is there on GPUs alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from todi.criterions.definitions import MASKED_LOGIT, NEARLY_ALL
from todi.criterions.rows import IGNORE_INDEX, RowTask
from todi.criterions.triton_points import POINTS

# Of the logits; and how many of the lowest bits are 0 when they are float32.
DTYPES = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
# A thread must own what it loads, or another could overwrite it before: at least 8 entries for each of the threads.
BLOCK, WARPS = 1024, 4

_MASKED = tl.constexpr(MASKED_LOGIT)
_NEARLY_ALL = tl.constexpr(NEARLY_ALL)
_IGNORE = tl.constexpr(IGNORE_INDEX)


@triton.jit
def _load(row, columns, vocabulary, readable):
    """Logits in float32; what is outside the vocabulary is masked, as -inf is. NaN stays NaN.

    Memory that may be read beyond the vocabulary makes wide loads of odd vocabularies: a mask that changes at multiples
    of 16 only.
    """
    logits = tl.load(row + columns, mask=columns < readable, other=float("-inf")).to(tl.float32)
    return tl.where((logits == float("-inf")) | (columns >= vocabulary), _MASKED, logits)


@triton.jit
def _online(most, total, x):
    """Of log-sum-exp: the largest so far, and the sum of exp(x - largest)."""
    larger = tl.maximum(most, tl.max(x, 0))
    return larger, total * tl.exp(most - larger) + tl.sum(tl.exp(x - larger), 0)


@triton.jit
def _log_softmax(x, most, log_total):
    return x - most - log_total


@triton.jit
def _common(logits, teacher_logits, inverse_temperature):
    """The student's logits over temperature, where the teacher has an entry."""
    return tl.where(teacher_logits > _MASKED, logits, _MASKED) * inverse_temperature


@triton.jit
def rows_kernel(logits_ptr, teacher_ptr, labels_ptr, sums_ptr, logits_stride, teacher_stride, vocabulary, readable,
                parameter, inverse_temperature, ce_factor, kd_factor, smoothing, inverse_softcap, scale,
                POINT: tl.constexpr, SELECTS: tl.constexpr, ZERO_BITS: tl.constexpr, SOFTCAPS: tl.constexpr,
                WRITES: tl.constexpr, BLOCK: tl.constexpr):
    """kd, ce, whether correct, 1 of the row; the gradient over its logits. POINT is None for cross-entropy alone."""
    number = tl.program_id(0).to(tl.int64)
    row, teacher_row = logits_ptr + number * logits_stride, teacher_ptr + number * teacher_stride
    label = tl.load(labels_ptr + number)
    lanes = tl.arange(0, BLOCK)
    sums = sums_ptr + number * 4
    if label == _IGNORE:
        for start in range(0, vocabulary, BLOCK):
            if WRITES:
                zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(row + start + lanes, zeros, mask=start + lanes < readable)
        for column in tl.static_range(4):
            tl.store(sums + column, 0.0)
        return

    # s, q and p are the student at 1, the student and the teacher at the temperature
    s_most, s_total, q_most, q_total, p_most, p_total, top, even, logits_mean = _log_sums(
        row, teacher_row, vocabulary, readable, inverse_temperature, POINT, BLOCK)
    label_logit = tl.load(row + label).to(tl.float32)
    label_logit = tl.where(label_logit == float("-inf"), _MASKED, label_logit)
    ce = -(1 - smoothing) * _log_softmax(label_logit, s_most, s_total)
    ce -= smoothing * (logits_mean - s_most - s_total)
    kd, h_sum = 0.0, 0.0
    if POINT is not None:
        if SELECTS:
            parameter = _head_share(row, teacher_row, vocabulary, readable, inverse_temperature, q_most, q_total,
                                    p_most, p_total, parameter, ZERO_BITS, BLOCK)
        kd, h_sum = _point_sums(row, teacher_row, vocabulary, readable, inverse_temperature, q_most, q_total, p_most,
                                p_total, parameter, POINT, BLOCK)
    tl.store(sums, kd)
    tl.store(sums + 1, ce)
    tl.store(sums + 2, (top == label).to(tl.float32))
    tl.store(sums + 3, 1.0)
    if WRITES:
        _write_gradient(row, teacher_row, label, vocabulary, readable, parameter, inverse_temperature, ce_factor,
                        kd_factor, smoothing, inverse_softcap, scale, s_most, s_total, q_most, q_total, p_most, p_total,
                        top, even, h_sum, POINT, SOFTCAPS, BLOCK)


@triton.jit
def _log_sums(row, teacher_row, vocabulary, readable, inverse_temperature, POINT: tl.constexpr, BLOCK: tl.constexpr):
    """Pass 1: the three log-sum-exps in two parts, the student's top, 1 / entries, the mean of its logits."""
    lanes = tl.arange(0, BLOCK)
    s_most, q_most = tl.full((), _MASKED, tl.float32), tl.full((), _MASKED, tl.float32)
    p_most = tl.full((), _MASKED, tl.float32)
    s_total, q_total, p_total = 0.0, 0.0, 0.0
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_start = tl.zeros((BLOCK,), tl.int32)
    logits_sum = tl.zeros((BLOCK,), tl.float32)
    allowed = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        logits = _load(row, start + lanes, vocabulary, readable)
        s_most, s_total = _online(s_most, s_total, logits)
        best_start = tl.where(logits > best, start, best_start)
        best = tl.maximum(best, logits)
        logits_sum += tl.where(logits > _MASKED, logits, 0.0)
        allowed += tl.where(logits > _MASKED, 1.0, 0.0)
        if POINT is not None:
            teacher_logits = _load(teacher_row, start + lanes, vocabulary, readable)
            q_most, q_total = _online(q_most, q_total, _common(logits, teacher_logits, inverse_temperature))
            p_most, p_total = _online(p_most, p_total, teacher_logits * inverse_temperature)
    top = tl.min(tl.where(best == s_most, best_start + lanes, vocabulary), 0)
    even = 1 / tl.sum(allowed, 0)
    return (s_most, tl.log(s_total), q_most, tl.log(q_total), p_most, tl.log(p_total), top, even,
            tl.sum(logits_sum, 0) * even)


@triton.jit
def _point_sums(row, teacher_row, vocabulary, readable, inverse_temperature, q_most, q_total, p_most, p_total,
                parameter, POINT: tl.constexpr, BLOCK: tl.constexpr):
    """Pass 2: the divergence, and the sum of h."""
    values, hs = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = _load(row, columns, vocabulary, readable)
        teacher_logits = _load(teacher_row, columns, vocabulary, readable)
        log_p = _log_softmax(teacher_logits * inverse_temperature, p_most, p_total)
        log_q = _log_softmax(_common(logits, teacher_logits, inverse_temperature), q_most, q_total)
        value, h = POINT(log_p, log_q, tl.exp(log_p), tl.exp(log_q), parameter)
        values += tl.where(teacher_logits > _MASKED, value, 0.0)
        hs += tl.where(teacher_logits > _MASKED, h, 0.0)
    return tl.maximum(tl.sum(values, 0), 0.0), tl.sum(hs, 0)


@triton.jit
def _write_gradient(row, teacher_row, label, vocabulary, readable, parameter, inverse_temperature, ce_factor, kd_factor,
                    smoothing, inverse_softcap, scale, s_most, s_total, q_most, q_total, p_most, p_total, top, even,
                    h_sum, POINT: tl.constexpr, SOFTCAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Pass 3: the gradient, over the student's logits.

    What has nearly all of q is left out and gets minus the sum of the others, as in the eager divergences.
    """
    settled = -1
    top_logit = tl.load(row + top).to(tl.float32)
    if POINT is not None:
        top_teacher = tl.load(teacher_row + top).to(tl.float32)
        top_log_q = _log_softmax(top_logit * inverse_temperature, q_most, q_total)
        settled = tl.where((tl.exp(top_log_q) > _NEARLY_ALL) & (top_teacher > float("-inf")), top, -1)
    others = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = _load(row, columns, vocabulary, readable)
        gradient = ce_factor * _ce_gradient(logits, columns, label, s_most, s_total, smoothing, even)
        if POINT is not None:
            teacher_logits = _load(teacher_row, columns, vocabulary, readable)
            log_p = _log_softmax(teacher_logits * inverse_temperature, p_most, p_total)
            log_q = _log_softmax(_common(logits, teacher_logits, inverse_temperature), q_most, q_total)
            q = tl.exp(log_q)
            value, h = POINT(log_p, log_q, tl.exp(log_p), q, parameter)
            kd_gradient = tl.where(teacher_logits > _MASKED, h - q * h_sum, 0.0)
            others += tl.where(columns == settled, 0.0, kd_gradient)
            gradient += kd_factor * kd_gradient
        gradient = _before_head(gradient, logits, inverse_softcap, scale, SOFTCAPS)
        tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=(columns < readable) & (columns != settled))
    if settled >= 0:
        gradient = ce_factor * _ce_gradient(top_logit, top, label, s_most, s_total, smoothing, even)
        gradient -= kd_factor * tl.sum(others, 0)
        gradient = _before_head(gradient, top_logit, inverse_softcap, scale, SOFTCAPS)
        tl.store(row + top, gradient.to(row.dtype.element_ty))


@triton.jit
def _order(x):
    """Unsigned integers in the order of the numbers x."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _mass_below(teacher_row, vocabulary, readable, inverse_temperature, p_most, p_total, bound, BLOCK: tl.constexpr):
    """Probability of the teacher's entries that come before `bound` in `_order`."""
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        logits = _load(teacher_row, start + tl.arange(0, BLOCK), vocabulary, readable)
        p = tl.exp(_log_softmax(logits * inverse_temperature, p_most, p_total))
        mass += tl.where(_order(logits) < bound, p, 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _head_share(row, teacher_row, vocabulary, readable, inverse_temperature, q_most, q_total, p_most, p_total, alpha,
                ZERO_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """adaptive_kl's weight. Where the head begins is found bit by bit, from the highest, instead of by sorting."""
    begin, below, bit = tl.zeros((), tl.uint32), 0.0, tl.full((), 1 << 31, tl.uint32)
    for _ in range(32 - ZERO_BITS):
        mass = _mass_below(teacher_row, vocabulary, readable, inverse_temperature, p_most, p_total, begin | bit, BLOCK)
        begin, below = tl.where(mass <= alpha, begin | bit, begin), tl.where(mass <= alpha, mass, below)
        bit = bit >> 1
    heads, gaps, seen = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), 0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        teacher_logits = _load(teacher_row, columns, vocabulary, readable)
        logits = _common(_load(row, columns, vocabulary, readable), teacher_logits, inverse_temperature)
        p = tl.exp(_log_softmax(teacher_logits * inverse_temperature, p_most, p_total))
        gap = tl.abs(p - tl.exp(_log_softmax(logits, q_most, q_total)))
        # of equal ones, the first belong to the tail as far as they fit in
        equal = (_order(teacher_logits) == begin).to(tl.int32)
        rank = seen + tl.cumsum(equal, 0)
        head = (_order(teacher_logits) > begin) | ((equal == 1) & (below + rank * p > alpha))
        heads += tl.where(head, gap, 0.0)
        gaps += gap
        seen += tl.sum(equal, 0)
    total = tl.sum(gaps, 0)
    return tl.where(total > 0, tl.sum(heads, 0) / total, 0.5)


@triton.jit
def _ce_gradient(logits, columns, label, most, log_total, smoothing, even):
    """q - target distribution, for entries that are not masked."""
    q = tl.exp(_log_softmax(logits, most, log_total))
    return q - tl.where(columns == label, 1 - smoothing, 0.0) - smoothing * even


@triton.jit
def _before_head(gradient, logits, inverse_softcap, scale, SOFTCAPS: tl.constexpr):
    """The gradient for hidden W^T + bias from that for the head's logits; 0 where they are masked."""
    if SOFTCAPS:
        capped = logits * inverse_softcap
        gradient *= 1 - capped * capped
    return tl.where(logits > _MASKED, gradient * scale, 0.0)


def fused_rows(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, task: RowTask) -> Tensor:
    """The row function (`todi.criterions.rows.RowFunction`) of a divergence in `POINTS`, for logits in `DTYPES`."""
    if task.masked is not None:
        for side in filter(torch.is_tensor, (logits, teacher_logits)):
            side.masked_fill_(task.masked, -torch.inf)
    point = None if teacher_logits is None else POINTS[task.divergence.name]
    parameter = float(task.divergence.arguments[point.parameter]) if point and point.parameter else 0.0
    teacher = logits if point is None else teacher_logits
    aligned = -(-task.vocabulary // 16) * 16
    readable = aligned if min(logits.stride(0), teacher.stride(0)) >= aligned else task.vocabulary
    rows = logits.new_empty(len(logits), 4, dtype=torch.float32)
    rows_kernel[(len(logits),)](
        logits, teacher, labels, rows, logits.stride(0), teacher.stride(0), task.vocabulary, readable, parameter,
        1 / task.temperature, 1.0 - task.kd_rate, task.kd_rate / task.temperature, float(task.label_smoothing),
        1 / (task.softcap or 1.0), float(task.scale),
        POINT=point and point.function, SELECTS=bool(point and point.selects), ZERO_BITS=DTYPES[teacher.dtype],
        SOFTCAPS=task.softcap is not None, WRITES=task.wants_gradients, BLOCK=BLOCK, num_warps=WARPS)
    kd, ce, correct, tokens = rows.sum(0)
    return torch.stack([(1 - task.kd_rate) * ce + task.kd_rate * kd, kd, ce, correct, tokens])
