"""Where the samples of each optimizer step come from."""

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch

from todi.data.plans import StepPlan, StepShape
from todi.data.tokenize import Example


class SampleSource(Protocol):
    """Where the samples of each step come from. Every rank has one and asks it the same questions.

    An epoch's samples and their order follow from the epoch's number and from what `state_dict` holds, so that a
    resumed run goes on exactly.
    """

    @property
    def steps_per_epoch(self) -> int: ...

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[StepPlan]:
        """The steps of epoch number `epoch`, counted from 1, from `first_step`, counted from 0, on.

        The plan that is asked for after one that `closes_round` may depend on the student's weights at that moment.
        """

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Hears of the means over each interval of the log and of each evaluation; for schedules that adapt."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the number of the step: JSON values, the same on every rank."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


class EpochSource(SampleSource):
    """A source without state: which samples an epoch has, in what order, follows from its number alone.

    A subclass says so; the steps are cut here, and the last step of an epoch takes what is left.
    """

    shape: StepShape

    @property
    @abstractmethod
    def samples_per_epoch(self) -> int: ...

    @abstractmethod
    def order(self, epoch: int) -> list[Example]:
        """The `samples_per_epoch` samples of epoch number `epoch`, counted from 1, in the order they come in."""

    @property
    def steps_per_epoch(self) -> int:
        return self.shape.steps(self.samples_per_epoch)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[StepPlan]:
        examples, size = self.order(epoch), self.shape.samples
        for step in range(first_step, self.steps_per_epoch):
            yield self.shape.cut(examples[step * size:(step + 1) * size])

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Nothing here adapts."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take up."""


@dataclass(frozen=True)
class DatasetSource(EpochSource):
    """One set of samples, each once in an epoch."""

    examples: Sequence[Example]
    shape: StepShape
    seed: int

    @property
    def samples_per_epoch(self) -> int:
        return len(self.examples)

    def order(self, epoch: int) -> list[Example]:
        return [self.examples[i] for i in shuffled(len(self.examples), self.seed, epoch)]


@dataclass(frozen=True)
class MixedSource(EpochSource):
    """Several sets of samples, each with a fixed number of samples an epoch.

    A set is a stream of passes over it, each shuffled anew, and an epoch goes on in it where the one before stopped:
    a sample comes again only after every other of its set has come. The first set alone, drawn from as often as it
    has samples, is a `DatasetSource`.

    Attributes:
        counts: how many samples of each set an epoch has, as `epoch_counts` gives them.
    """

    sets: Sequence[Sequence[Example]]
    counts: Sequence[int]
    shape: StepShape
    seed: int

    @property
    def samples_per_epoch(self) -> int:
        return sum(self.counts)

    def order(self, epoch: int) -> list[Example]:
        drawn = [self._drawn(number, epoch) for number in range(len(self.sets))]
        numbers = [number for number, count in enumerate(self.counts) for _ in range(count)]
        places = shuffled(len(numbers), self.seed, epoch, stream=len(self.sets))
        return [next(drawn[numbers[place]]) for place in places]

    def _drawn(self, number: int, epoch: int) -> Iterator[Example]:
        """What an epoch draws from set number `number`."""
        examples, count = self.sets[number], self.counts[number]
        passes, start = divmod((epoch - 1) * count, len(examples))
        stream = (examples[i] for later in itertools.count(passes + 1)
                  for i in shuffled(len(examples), self.seed, later, stream=number))
        return itertools.islice(stream, start, start + count)


def build_source(examples: Sequence[Example], sizes: Sequence[int], shares: Sequence[float], shape: StepShape,
                 seed: int) -> EpochSource:
    """The source of one set, or of several mixed by their shares.

    Args:
        examples: of all sets, one after the other.
        sizes: how many of them each set has.
        shares: as in `epoch_counts`.
    """
    if len(sizes) == 1:
        return DatasetSource(examples, shape, seed)
    ends = list(itertools.accumulate(sizes))
    sets = [examples[end - size:end] for end, size in zip(ends, sizes, strict=True)]
    return MixedSource(sets, epoch_counts(sizes, shares), shape, seed)


def epoch_counts(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """How many samples of each set an epoch has, which has as many as all sets together.

    Args:
        sizes: of the sets.
        shares: of each set, in any unit; the largest remainders are rounded up, the first of equal ones. Without any,
            every sample comes once.
    """
    if not shares:
        return list(sizes)
    exact = [Fraction(str(share)) for share in shares]  # 0.1 is a tenth, as it was written
    wanted = [sum(sizes) * share / sum(exact) for share in exact]
    counts = [int(count) for count in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda number: counts[number] - wanted[number])
    for number in by_remainder[:sum(sizes) - sum(counts)]:
        counts[number] += 1
    return counts


def shuffled(count: int, seed: int, epoch: int, stream: int = 0) -> list[int]:
    """0 to count - 1 in an order that follows from seed, epoch and the number of a stream of such orders."""
    # The generator takes 32 bits of a seed. There multiples of the golden ratio lie far apart, so that no two epochs
    # of two streams share one.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + stream * 0x9E37_79B9)
    return torch.randperm(count, generator=generator).tolist()
