"""The loss of an objective that counts some rows only (`todi.criterions.selection`).

Which rows these are is found out first, without gradients and by the student's head alone where that is enough; both
heads and the divergence are then computed for these. The cross-entropy is that of all rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from todi.criterions.definitions import MASKED_LOGIT, Divergence, compute_dtype, log_probabilities
from todi.criterions.linear import LossSums, distillation_loss, masked_entries
from todi.criterions.linear_head import LinearHead
from todi.criterions.rows import block_bytes, slices
from todi.criterions.selection import Selection, kept_of, largest_of_each
from todi.criterions.teacher_rows import TeacherRows


def selected_loss(hidden: Tensor, head: LinearHead, teacher: TeacherRows, labels: Tensor, counts: Sequence[int], *,
                  divergence: Divergence, temperature: float, kd_rate: float, label_smoothing: float = 0.0,
                  chunk_size: int | None = None, kernels: str = "auto") -> LossSums:
    """As `distillation_loss`, where `kd` is 1 / share times the sum over the rows that are kept.

    So it has the scale of a sum over all rows: per token it is the mean over the kept ones, but that a sample keeps up
    to one row more than its share.

    Args:
        counts: rows of each sample, N in all, one sample after the other; every row has a label.

    Raises:
        ValueError: `counts` are of other rows.
    """
    if sum(counts) != len(hidden):
        raise ValueError(f"counts must be those of the {len(hidden)} rows, got {sum(counts)}")
    vocabulary, share = min(len(head.weight), teacher.vocabulary), divergence.numbers["share"]
    common = head if vocabulary == len(head.weight) else head.cropped(vocabulary)
    values = _statistic(hidden, common, teacher, divergence.definition.selection, temperature)
    kept = largest_of_each(values, counts, share)
    with torch.set_grad_enabled(torch.is_grad_enabled() and kd_rate < 1):
        alone = distillation_loss(hidden, common, None, labels, divergence=None, label_smoothing=label_smoothing,
                                  chunk_size=chunk_size, kernels=kernels)
    chosen = distillation_loss(hidden[kept], common, teacher.taken(kept), labels[kept], divergence=divergence,
                               temperature=_temperatures(values[kept], counts, divergence, temperature), kd_rate=1.0,
                               chunk_size=chunk_size, kernels=kernels)
    loss = (1 - kd_rate) * alone.loss + kd_rate / share * chosen.loss
    return LossSums(loss, chosen.kd / share, alone.ce, alone.correct, alone.tokens)


@torch.no_grad()
def _statistic(hidden: Tensor, head: LinearHead, teacher: TeacherRows, selection: Selection,
               temperature: float) -> Tensor:
    """(N,) by which the rows are chosen, at the temperature of the divergence."""
    vocabulary, dtype = len(head.weight), compute_dtype(hidden)
    masked = masked_entries(head, teacher, vocabulary)
    size, values = max(1, block_bytes(hidden.device) // (4 * vocabulary)), [hidden.new_zeros(0, dtype=dtype)]
    for rows in slices(len(hidden), size):
        logits = head.rows(hidden[rows]).to(dtype)
        if masked is not None:
            logits = logits.masked_fill(masked, -torch.inf if selection.compares else MASKED_LOGIT)
        if selection.compares:
            sides = log_probabilities(logits, teacher.logits(rows, vocabulary, temperature), temperature)
        else:
            sides = torch.log_softmax(logits / temperature, -1),
        values.append(selection.statistic(*sides))
    return torch.cat(values)


def _temperatures(values: Tensor, counts: Sequence[int], divergence: Divergence, temperature: float) -> float | Tensor:
    """That of all kept rows, or of each (K,)."""
    selection, numbers = divergence.definition.selection, divergence.numbers
    if selection.temperatures is None:
        return temperature
    own = {name: numbers[name] for name in selection.parameters if name != "share"}
    return temperature * selection.temperatures(values, [kept_of(count, numbers["share"]) for count in counts], **own)
