"""The training criterion: which divergence, how hot, and in what proportion to the cross-entropy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from todi.criterions.definitions import Divergence
from todi.criterions.linear import distillation_loss
from todi.criterions.linear_head import LinearHead
from todi.criterions.schedules import Schedule
from todi.criterions.selected import selected_loss
from todi.criterions.teacher_rows import TeacherRows


@dataclass(frozen=True)
class DistillationCriterion:
    """(1 - kd_rate) cross-entropy + kd_rate divergence; cross-entropy alone (SFT) without a divergence.

    It never runs a model and never divides: the trainer divides its sums once per optimizer step.

    Attributes:
        terms: weights of the student's loss terms that are added, by name.
        kernels: what computes between the matrix products (`todi.criterions.kernels`).
        own: the criterion of samples that the student wrote, where it is another, as in DistiLLM-2 (arXiv 2503.07067):
            skewed forward KL on the teacher's text, skewed reverse KL on the student's.
    """

    divergence: Divergence | None = None
    temperature: float = 1.0
    kd_rate: float = 0.0
    label_smoothing: float = 0.0
    chunk_size: int | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    kernels: str = "auto"
    own: "DistillationCriterion | None" = None

    @property
    def selects(self) -> bool:
        """Whether it takes some rows of each sample, and so has to know which rows are whose."""
        return self.divergence is not None and self.divergence.definition.selection is not None

    def schedule(self, total_steps: int) -> Schedule | None:
        """What moves parameters of the divergence over so many optimizer steps; None where nothing does."""
        return None if self.divergence is None else self.divergence.schedule(total_steps)

    def at(self, moved: Mapping[str, float]) -> "DistillationCriterion":
        """The same where the schedule has these values."""
        return replace(self, divergence=self.divergence.at(moved))

    def __call__(self, hidden: Tensor, head: LinearHead, labels: Tensor,
                 teacher: TeacherRows | None, counts: Sequence[int] | None = None,
                 own: Sequence[bool] = ()) -> Mapping[str, Tensor]:
        """Sums over the rows of `hidden` (N, H) with `labels` (N,), by name: those of `LossSums`, without `kd` where
        there is no divergence.

        Args:
            counts: rows of each sample, one sample after the other; for a divergence of selected rows.
            own: of each sample, whether the student wrote it; none did without it.

        Raises:
            ValueError: `counts` are missing for such a divergence.
        """
        if self.own and any(own):
            return self._by_author(hidden, head, labels, teacher, counts, own)
        options = {"divergence": self.divergence, "temperature": self.temperature, "kd_rate": self.kd_rate,
                   "label_smoothing": self.label_smoothing, "chunk_size": self.chunk_size, "kernels": self.kernels}
        if self.selects:
            if counts is None:
                raise ValueError(f"{self.divergence.name} selects rows of each sample: say how many each has")
            sums = selected_loss(hidden, head, teacher, labels, counts, **options)._asdict()
        else:
            sums = distillation_loss(hidden, head, teacher, labels, **options)._asdict()
        return sums if self.divergence else {name: value for name, value in sums.items() if name != "kd"}

    def _by_author(self, hidden: Tensor, head: LinearHead, labels: Tensor, teacher: TeacherRows,
                   counts: Sequence[int], own: Sequence[bool]) -> Mapping[str, Tensor]:
        author, found = torch.repeat_interleave(torch.tensor(own), torch.tensor(counts)), []
        for criterion, wrote in ((replace(self, own=None), False), (self.own, True)):
            rows = (author == wrote).nonzero().squeeze(1).to(hidden.device)  # looked for on the CPU
            found.append(criterion(hidden[rows], head, labels[rows], teacher.taken(rows),
                                   [count for count, one in zip(counts, own, strict=True) if one == wrote]))
        return {name: value + found[1][name] for name, value in found[0].items()}
