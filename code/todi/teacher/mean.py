"""The teacher source that is the mean of several."""

from collections.abc import Sequence

from torch import nn

from todi.criterions import LinearHead, MeanRows
from todi.data.batches import Batch
from todi.data.tokenize import Example
from todi.teacher.source import TeacherSource


class MeanTeacher:
    """Several teachers whose probabilities are averaged; each is asked by itself, so one may be live, another cached.

    Args:
        weights: of each in the mean, > 0; even where there are none.
    """

    def __init__(self, sources: Sequence[TeacherSource], weights: Sequence[float] = ()):
        self.sources = sources
        self.weights = weights or [1.0] * len(sources)
        self.takes_packed = all(source.takes_packed for source in sources)

    def rows(self, batch: Batch) -> MeanRows:
        return MeanRows([source.rows(batch) for source in self.sources], self.weights)

    def expect(self, samples: Sequence[int]) -> None:
        for source in self.sources:
            source.expect(samples)

    def read(self, number: int, samples: Sequence[Example]) -> None:
        """Has each read the samples of a round; of `RoundTeacher`s alone."""
        for source in self.sources:
            source.read(number, samples)

    def forget_before(self, number: int) -> None:
        """Has each forget the rounds before one; of `RoundTeacher`s alone."""
        for source in self.sources:
            source.forget_before(number)

    @property
    def parts(self) -> list[tuple[nn.Module | None, LinearHead]]:
        return [part for source in self.sources for part in source.parts]
