"""The teacher source that runs a model on every batch."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from todi.criterions import HeadRows, LinearHead
from todi.data.batches import Batch
from todi.models.backbone import backbone_and_head, labelled_layers
from todi.models.packing import takes_packed
from todi.runtime.distributed import World


class LiveTeacher:
    """A frozen model that is run on every batch.

    Args:
        layers: whose outputs its rows have too, counted from 1.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] = ()):
        self.backbone, self.head = backbone_and_head(model.eval().requires_grad_(False))
        self.layers = layers
        self.takes_packed = takes_packed(model)

    @torch.no_grad()
    def rows(self, batch: Batch) -> HeadRows:
        hidden, layers = labelled_layers(self.backbone, batch.inputs, batch.rows, self.layers)
        return HeadRows(hidden, self.head, layers)

    def expect(self, samples: Sequence[int]) -> None:
        """There is nothing to fetch."""

    def at_own_pace(self, world: World) -> AbstractContextManager[None]:
        """Within the block a rank may have `rows` of as many batches as it likes, whatever the others do."""
        return nullcontext()

    @property
    def parts(self) -> list[tuple[nn.Module, LinearHead]]:
        return [(self.backbone, self.head)]
