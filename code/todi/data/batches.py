"""The tensors of a micro-batch."""

from collections.abc import Sequence
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
        sample_ids: (B,) `Example.sample_id` of each sample, -1 for a filler without labels; always on the CPU,
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


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """The batch of some samples. The last token of a sample is only ever a label, so T is one less than the longest.

    Without any it is one filler sample without labels, so that every rank can run the same number of micro-batches.
    """
    examples = examples or [Example(ids=(pad_id, pad_id), prompt_length=2)]
    length = max(len(example.ids) for example in examples) - 1
    input_ids = torch.full((len(examples), length), pad_id)
    labels = torch.full((len(examples), length), IGNORE_INDEX)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        input_ids[row, :len(ids) - 1] = ids[:-1]
        mask[row, :len(ids) - 1] = 1
        start = example.prompt_length - 1
        labels[row, start:len(ids) - 1] = ids[start + 1:]
    rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
    return Batch(input_ids, mask, labels, rows, torch.tensor([example.sample_id for example in examples]))
