"""The loss of an objective that counts some rows only (`todi.criterions.selection`).

Which rows these are is found out first, without gradients and by the student's head alone where that is enough; both
heads and the divergence are then computed for these. The cross-entropy is that of all rows; where it has no gradient,
as with a `kd_rate` of 1, it is found on the way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from todi.criterions.definitions import MASKED_LOGIT, Divergence, compute_dtype, log_probabilities
from todi.criterions.kernels import choose_rows
from todi.criterions.linear import LossSums, default_chunk_size, distillation_loss, masked_entries
from todi.criterions.linear_head import LinearHead
from todi.criterions.rows import RowTask, block_bytes, slices
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
    look = _Look(common, teacher, divergence.definition.selection, temperature,
                 chunk_size or default_chunk_size(vocabulary, hidden.device, common.weight.element_size()))
    if torch.is_grad_enabled() and kd_rate < 1:
        values, _ = look(hidden)
        alone = distillation_loss(hidden, common, None, labels, divergence=None, label_smoothing=label_smoothing,
                                  chunk_size=chunk_size, kernels=kernels)
    else:
        values, alone = look(hidden, labels, label_smoothing, kernels)
    kept = largest_of_each(values, counts, share)
    chosen = distillation_loss(hidden[kept], common, teacher.taken(kept), labels[kept], divergence=divergence,
                               temperature=_temperatures(values[kept], counts, divergence, temperature), kd_rate=1.0,
                               chunk_size=chunk_size, kernels=kernels)
    loss = (1 - kd_rate) * alone.loss + kd_rate / share * chosen.loss
    return LossSums(loss, chosen.kd / share, alone.ce, alone.correct, alone.tokens)


@dataclass(frozen=True)
class _Look:
    """Goes through the rows without gradients, by the student's head, and the teacher's where that is asked.

    Attributes:
        temperature: of the divergence.
        chunk_size: rows that go through a head at a time.
    """

    head: LinearHead
    teacher: TeacherRows
    selection: Selection
    temperature: float
    chunk_size: int

    @torch.no_grad()
    def __call__(self, hidden: Tensor, labels: Tensor | None = None, label_smoothing: float = 0.0,
                 kernels: str = "auto") -> tuple[Tensor, LossSums | None]:
        """(N,) by which the rows are chosen; with `labels`, the sums of their cross-entropy as well."""
        dtype, vocabulary = compute_dtype(hidden), len(self.head.weight)
        values, sums = [hidden.new_zeros(0, dtype=dtype)], hidden.new_zeros(5, dtype=dtype)
        task = RowTask(None, 1.0, 0.0, label_smoothing, self.head.softcap, self.head.scale, vocabulary,
                       masked_entries(self.head, None, vocabulary), sparse=False, dtype=dtype, device=hidden.device,
                       wants_gradients=False)
        row_function = None if labels is None else choose_rows(kernels, self.head.weight.dtype, task)
        masked = masked_entries(self.head, self.teacher, vocabulary)
        for rows in slices(len(hidden), self.chunk_size):
            logits = self.head.rows(hidden[rows])
            values += self._statistic(logits, rows, masked, dtype)
            if row_function:  # it may leave the logits in any state
                sums += row_function(logits, None, labels[rows], task)
        return torch.cat(values), None if labels is None else LossSums(*sums)

    def _statistic(self, logits: Tensor, rows: slice, masked: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
        """Of `rows`, whose logits these are, a few at a time."""
        selection, vocabulary = self.selection, logits.shape[1]
        theirs = self.teacher.logits(rows, vocabulary, self.temperature) if selection.compares else None
        for block in slices(len(logits), max(1, block_bytes(logits.device) // (4 * vocabulary))):
            ours = logits[block].to(dtype)
            if masked is not None:
                ours = ours.masked_fill(masked, -torch.inf if selection.compares else MASKED_LOGIT)
            if selection.compares:
                sides = log_probabilities(ours, theirs[block], self.temperature)
            else:
                sides = torch.log_softmax(ours / self.temperature, -1),
            yield selection.statistic(*sides)


def _temperatures(values: Tensor, counts: Sequence[int], divergence: Divergence, temperature: float) -> float | Tensor:
    """That of all kept rows, or of each (K,)."""
    selection, numbers = divergence.definition.selection, divergence.numbers
    if selection.temperatures is None:
        return temperature
    own = {name: numbers[name] for name in selection.parameters if name != "share"}
    return temperature * selection.temperatures(values, [kept_of(count, numbers["share"]) for count in counts], **own)
