"""The teacher source that runs a model on every batch."""

from collections.abc import Sequence

import torch
from torch import nn

from todi.criterions import HeadRows
from todi.data.batches import Batch
from todi.models.backbone import backbone_and_head, labelled_rows


class LiveTeacher:
    """A frozen model that is run on every batch."""

    def __init__(self, model: nn.Module):
        self.backbone, self.head = backbone_and_head(model.eval().requires_grad_(False))

    @torch.no_grad()
    def rows(self, batch: Batch) -> HeadRows:
        return HeadRows(labelled_rows(self.backbone, batch.input_ids, batch.attention_mask, batch.rows), self.head)

    def expect(self, samples: Sequence[int]) -> None:
        """There is nothing to fetch."""
