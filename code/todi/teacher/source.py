"""Who answers for the labelled rows of a batch. Training does not care whether a model, a file or a function does."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from todi.criterions import LinearHead, TeacherRows
from todi.data.batches import Batch


class TeacherSource(Protocol):
    """Answers for the labelled rows of a batch of samples.

    Attributes:
        takes_packed: whether batches may be packed.
    """

    takes_packed: bool

    def rows(self, batch: Batch) -> TeacherRows:
        """What the teacher says at `batch.rows`."""

    def expect(self, samples: Sequence[int]) -> None:
        """Says which samples come next, so that they can be fetched meanwhile."""

    @property
    def parts(self) -> Sequence[tuple[nn.Module | None, LinearHead]]:
        """The models that run on a batch, by backbone and head; None for a backbone that does not."""
