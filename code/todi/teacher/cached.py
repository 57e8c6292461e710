"""The teacher source that reads a cache instead of running a model."""

from collections.abc import Sequence

import torch

from todi.criterions import HeadRows, LinearHead
from todi.data.batches import Batch
from todi.teacher.cache_files import CacheStore


class CachedTeacher:
    """Answers from the files of a complete cache; only the teacher's head is in memory.

    Raises:
        CorruptCache: head, indices or the length of a shard are not what was written.
    """

    takes_packed = True  # it looks at no token

    def __init__(self, store: CacheStore, device: torch.device):
        self.store = store
        self.device = device
        self.head = store.head(device)
        _ = store.places  # a damaged index is found before training, not within it

    def rows(self, batch: Batch) -> HeadRows:
        """Raises CorruptCache when a sample is not what was written."""
        hidden = self.store.read([sample for sample in batch.sample_ids.tolist() if sample >= 0])
        return HeadRows(hidden.to(self.device), self.head)

    def expect(self, samples: Sequence[int]) -> None:
        self.store.expect(samples)

    @property
    def parts(self) -> list[tuple[None, LinearHead]]:
        return [(None, self.head)]
