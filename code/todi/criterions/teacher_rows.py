"""What a teacher says of the labelled rows of a batch: hidden states and a head, a mean of teachers, or logits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from todi.criterions.definitions import compute_dtype
from todi.criterions.linear_head import LinearHead


class TeacherRows(Protocol):
    """N rows of logits, made when they are asked for: of all rows at once they are the largest tensor there is."""

    @property
    def vocabulary(self) -> int:
        """V, entries of a row of its logits; padding counts."""

    @property
    def masked(self) -> Tensor | None:
        """(V,) entries that it never gives, as by a head's bias of -inf: left out in both models. None without any."""

    @property
    def sparse(self) -> bool:
        """Whether a row may have entries of -inf besides `masked`: the divergence leaves them out, in both models."""

    def logits(self, rows: slice, vocabulary: int, temperature: float | Tensor) -> Tensor:
        """The logits of some rows, in any precision; a tensor that the caller may overwrite.

        Args:
            vocabulary: of the first so many entries, at most V.
            temperature: T, at which the divergence compares: the teacher's distribution is softmax(logits / T). Or
                (n, 1), of each row.

        Returns:
            (n, vocabulary).
        """

    def taken(self, rows: Tensor) -> "TeacherRows":
        """What it says of some of the rows, (K,) by their numbers, and of no others."""


@dataclass(frozen=True)
class HeadRows:
    """A model's last layer, still to be applied.

    Attributes:
        hidden: (N, H) last hidden states, after the final norm.
        layers: (N, H) outputs of layers that were asked for, by their number, counted from 1.
    """

    hidden: Tensor
    head: LinearHead
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    sparse = False

    @property
    def vocabulary(self) -> int:
        return len(self.head.weight)

    @property
    def masked(self) -> Tensor | None:
        return None if self.head.bias is None else self.head.bias.isneginf()

    def logits(self, rows: slice, vocabulary: int, temperature: float | Tensor) -> Tensor:
        return self.head.cropped(vocabulary).rows(self.hidden[rows])

    def taken(self, rows: Tensor) -> "HeadRows":
        return HeadRows(self.hidden[rows], self.head, {layer: output[rows] for layer, output in self.layers.items()})


@dataclass(frozen=True)
class MeanRows:
    """Several teachers as one, whose probabilities at the temperature T are sum_i w_i softmax(t_i / T).

    An entry counts as far as any of the teachers gives it. The vocabulary is the smallest of theirs.

    Attributes:
        teachers: one or more, of the same N rows.
        weights: of each, > 0; divided by their sum.
    """

    teachers: Sequence[TeacherRows]
    weights: Sequence[float]

    @property
    def vocabulary(self) -> int:
        return min(teacher.vocabulary for teacher in self.teachers)

    @property
    def masked(self) -> Tensor | None:
        masks = [teacher.masked for teacher in self.teachers]
        if any(mask is None for mask in masks):
            return None
        return torch.stack([mask[:self.vocabulary] for mask in masks]).all(0)

    @property
    def sparse(self) -> bool:
        return any(teacher.sparse for teacher in self.teachers)

    def logits(self, rows: slice, vocabulary: int, temperature: float | Tensor) -> Tensor:
        """T log sum_i w_i softmax(t_i / T), in float32 (float64 where the first teacher's are)."""
        mean, whole = None, sum(self.weights)
        for teacher, weight in zip(self.teachers, self.weights, strict=True):
            log_p = _log_probabilities(teacher, rows, vocabulary, temperature).add_(math.log(weight / whole))
            mean = log_p if mean is None else torch.logaddexp(mean, log_p, out=mean)
        return mean.mul_(temperature)

    def taken(self, rows: Tensor) -> "MeanRows":
        return MeanRows([teacher.taken(rows) for teacher in self.teachers], self.weights)


@dataclass(frozen=True)
class LogitRows:
    """Logits that are there already.

    Attributes:
        values: (N, V); -inf for an entry that is not known, such as all but the best of a row.
    """

    values: Tensor

    masked = None
    sparse = True

    @property
    def vocabulary(self) -> int:
        return self.values.shape[-1]

    def logits(self, rows: slice, vocabulary: int, temperature: float | Tensor) -> Tensor:
        return self.values[rows, :vocabulary].clone()

    def taken(self, rows: Tensor) -> "LogitRows":
        return LogitRows(self.values[rows])


def _log_probabilities(teacher: TeacherRows, rows: slice, vocabulary: int, temperature: float | Tensor) -> Tensor:
    """(n, vocabulary); -inf for an entry that is masked, which soft-capping may have made finite."""
    logits = teacher.logits(rows, vocabulary, temperature)
    logits = logits.to(compute_dtype(logits)).div_(temperature)
    if teacher.masked is not None:
        logits.masked_fill_(teacher.masked[:vocabulary], -torch.inf)
    return logits.log_softmax(-1)
