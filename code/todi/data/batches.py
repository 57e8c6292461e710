"""The tensors of a micro-batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from todi.criterions.linear import IGNORE_INDEX
from todi.data.tokenize import Example
from todi.models.packing import sample_bounds


@dataclass(frozen=True)
class Batch:
    """A micro-batch of samples: S rows, padded on the right to the longest, T; or packed one after the other, in one.

    Attributes:
        input_ids: (S, T); packed (1, T).
        attention_mask: (S, T), 1 for a token, 0 for padding; packed, the `sample_bounds`.
        position_ids: packed (1, T), from 0 in each sample; else None.
        labels: as `input_ids`; the token that follows there where that is part of the response (EOS included), else
            -100.
        rows: (N,) positions of the labels in the flattened `labels`; found here, on the CPU, since looking
            for them on a GPU would make it wait.
        sample_ids: (S,) `Example.sample_id` of each sample, -1 for a filler without labels; always on the CPU,
            where a teacher cache looks them up.
        counts: labels of each sample; their rows follow one another.
        own: of each sample, whether the student wrote its response.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    labels: Tensor
    rows: Tensor
    sample_ids: Tensor
    counts: tuple[int, ...]
    own: tuple[bool, ...]

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`, but for the sample ids."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """A copy in page-locked memory, from where a GPU fetches it while it computes."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        return Batch(**changed | {"sample_ids": self.sample_ids})

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.position_ids is None else inputs | {"position_ids": self.position_ids}

    @property
    def row_labels(self) -> Tensor:
        """(N,) the labels of `rows`."""
        return self.labels.flatten()[self.rows]


Collate = Callable[[Sequence[Example]], Batch]


def collate(examples: Sequence[Example], pad_id: int, packed: bool = False) -> Batch:
    """The batch of some samples. The last token of a sample is only ever a label, so T is one less than the longest.

    Without any it is one filler sample without labels, so that every rank can run the same number of micro-batches.
    """
    examples = examples or [Example(ids=(pad_id, pad_id), prompt_length=2)]
    ids = [torch.tensor(example.ids[:-1]) for example in examples]
    labels = [_labels(example) for example in examples]
    counts = tuple(int((part != IGNORE_INDEX).sum()) for part in labels)
    lengths = [len(part) for part in ids]
    if packed:
        input_ids, mask, labels = torch.cat(ids)[None], sample_bounds(lengths), torch.cat(labels)[None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids, labels = pad(ids, True, pad_id), pad(labels, True, IGNORE_INDEX)
        mask, positions = pad([torch.ones_like(part) for part in ids], True), None
    rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
    samples = torch.tensor([example.sample_id for example in examples])
    return Batch(input_ids, mask, positions, labels, rows, samples, counts,
                 tuple(example.own for example in examples))


def _labels(example: Example) -> Tensor:
    labels = torch.tensor(example.ids[1:])
    labels[:example.prompt_length - 1] = IGNORE_INDEX
    return labels
