"""Which samples make an optimizer step, and the tensors of a micro-batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from todi.criterions.linear import IGNORE_INDEX
from todi.data.tokenize import Example


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B samples, padded on the right to its longest, T.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, T), 1 for a token, 0 for padding.
        labels: (B, T); `labels[b, t]` is the token that follows `input_ids[b, t]` where that is part of the
            response (EOS included), else -100.
        rows: (N,) positions of the labels in a flattened (B * T) batch; found here, on the CPU, since looking
            for them on a GPU would make it wait.
        sample_ids: (B,) index of each sample in the data set, -1 for a filler without labels; always on the CPU,
            where a teacher cache looks them up.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: Tensor
    sample_ids: Tensor

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`, but for the sample ids."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        return Batch(**moved | {"sample_ids": self.sample_ids})

    @property
    def row_labels(self) -> Tensor:
        """(N,) the labels of `rows`."""
        return self.labels.flatten()[self.rows]


def collate(examples: Sequence[Example], sample_ids: Sequence[int], pad_id: int) -> Batch:
    """The batch of `sample_ids`. The last token of a sample is only ever a label, so T is one less than the longest.

    An empty list gives one filler sample without labels, so that every rank can run the same number of
    micro-batches.
    """
    chosen = [examples[i] for i in sample_ids] or [Example(ids=(pad_id, pad_id), prompt_length=2)]
    length = max(len(example.ids) for example in chosen) - 1
    input_ids = torch.full((len(chosen), length), pad_id)
    labels = torch.full((len(chosen), length), IGNORE_INDEX)
    mask = torch.zeros((len(chosen), length), dtype=torch.long)
    for row, example in enumerate(chosen):
        ids = torch.tensor(example.ids)
        input_ids[row, :len(ids) - 1] = ids[:-1]
        mask[row, :len(ids) - 1] = 1
        start = example.prompt_length - 1
        labels[row, start:len(ids) - 1] = ids[start + 1:]
    rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
    return Batch(input_ids, mask, labels, rows, torch.tensor(sample_ids or [-1]))


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of one rank.

    Attributes:
        micro_batches: sample indices of each micro-batch; one may be empty.
        samples: samples of the whole step, over all ranks.
        tokens: response tokens of the whole step, over all micro-batches and ranks: what its loss is divided by.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    samples: int
    tokens: int


@dataclass(frozen=True)
class StepPlanner:
    """Cuts each epoch into optimizer steps, on every rank alike and without communication.

    A step takes the next `batch_size * accumulation * world` samples of the epoch's shuffle (the last step what
    is left), sorts them by length, and deals them out so that samples of like length share a micro-batch and
    the ranks work on like lengths at the same time. An epoch's order follows from seed and epoch alone.

    Attributes:
        batch_size: most samples of a micro-batch.
        accumulation: micro-batches of a step, on every rank, always.
    """

    examples: Sequence[Example]
    batch_size: int
    accumulation: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def step_samples(self) -> int:
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.step_samples)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepPlan]:
        """The steps of epoch number `epoch`, from `first_step` on."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        for step in range(first_step, self.steps_per_epoch):
            yield self._plan(order[step * self.step_samples:(step + 1) * self.step_samples])

    def _plan(self, samples: list[int]) -> StepPlan:
        by_length = sorted(samples, key=lambda i: len(self.examples[i].ids))
        parts = self.accumulation * self.world
        cuts = [len(samples) * part // parts for part in range(parts + 1)]
        mine = range(self.rank, parts, self.world)
        return StepPlan(
            micro_batches=tuple(tuple(by_length[cuts[part]:cuts[part + 1]]) for part in mine),
            samples=len(samples),
            tokens=sum(self.examples[i].response_tokens for i in samples))
