"""Which samples make an optimizer step: where they come from, and how a step is cut over micro-batches and ranks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from todi.data.tokenize import Example


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of one rank.

    Attributes:
        micro_batches: samples of each micro-batch; one may be empty.
        samples: how many the whole step has, over all ranks.
        tokens: response tokens of the whole step, over all micro-batches and ranks: what its loss is divided by.
    """

    micro_batches: tuple[tuple[Example, ...], ...]
    samples: int
    tokens: int


@dataclass(frozen=True)
class StepShape:
    """How a step is cut, on every rank alike and without communication.

    Attributes:
        batch_size: most samples of a micro-batch.
        accumulation: micro-batches of a step, on every rank, always.
    """

    batch_size: int
    accumulation: int
    rank: int = 0
    world: int = 1

    @property
    def samples(self) -> int:
        """Of a full step, over all ranks."""
        return self.batch_size * self.accumulation * self.world

    def cut(self, examples: Sequence[Example]) -> StepPlan:
        """This rank's part of the step that trains on `examples`.

        Samples of like length share a micro-batch, and the ranks work on like lengths at the same time.
        """
        by_length = sorted(examples, key=lambda example: len(example.ids))
        parts = self.accumulation * self.world
        cuts = [len(examples) * part // parts for part in range(parts + 1)]
        mine = range(self.rank, parts, self.world)
        return StepPlan(
            micro_batches=tuple(tuple(by_length[cuts[part]:cuts[part + 1]]) for part in mine),
            samples=len(examples),
            tokens=sum(example.response_tokens for example in examples))


class SampleSource(Protocol):
    """Where the samples of each step come from. Every rank has one and asks it the same questions.

    An epoch's samples and their order follow from the epoch's number and from what `state_dict` holds, so that a
    resumed run goes on exactly.
    """

    @property
    def steps_per_epoch(self) -> int: ...

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[StepPlan]:
        """The steps of epoch number `epoch`, counted from 1, from `first_step`, counted from 0, on."""

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Hears of the means over each interval of the log and of each evaluation; for schedules that adapt."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the number of the step: JSON values, the same on every rank."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


@dataclass(frozen=True)
class DatasetSource:
    """One set of samples, each once in an epoch; the last step of an epoch takes what is left.

    An epoch's order follows from seed and epoch alone.
    """

    examples: Sequence[Example]
    shape: StepShape
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.shape.samples)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[StepPlan]:
        order = shuffled(len(self.examples), self.seed, epoch)
        size = self.shape.samples
        for step in range(first_step, self.steps_per_epoch):
            yield self.shape.cut([self.examples[i] for i in order[step * size:(step + 1) * size]])

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Nothing here adapts."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take up."""


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """0 to count - 1 in an order that follows from seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()
