"""Where the teacher's hidden states come from. Training does not care whether a model or a file answers."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from todi.criterions.criterion import TeacherRows
from todi.data.batches import Batch
from todi.models.backbone import backbone_and_head, labelled_rows


class TeacherSource(Protocol):
    """Answers for the labelled rows of a batch of samples."""

    def rows(self, batch: Batch) -> TeacherRows:
        """The teacher's hidden states at `batch.rows`, and its head."""

    def expect(self, samples: Sequence[int]) -> None:
        """Says which samples come next, so that they can be fetched meanwhile."""


class LiveTeacher:
    """A frozen model that is run on every batch."""

    def __init__(self, model: nn.Module):
        self.backbone, self.head = backbone_and_head(model.eval().requires_grad_(False))

    @torch.no_grad()
    def rows(self, batch: Batch) -> TeacherRows:
        return TeacherRows(labelled_rows(self.backbone, batch.input_ids, batch.attention_mask, batch.rows), self.head)

    def expect(self, samples: Sequence[int]) -> None:
        """There is nothing to fetch."""
