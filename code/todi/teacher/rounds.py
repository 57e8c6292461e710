"""The teacher source of text that the student writes: the model reads the samples of a round once, when it begins."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from todi.criterions import HeadRows, LinearHead
from todi.data.batches import Batch, collate
from todi.data.tokenize import Example, examples_checksum
from todi.errors import InputError
from todi.runtime.distributed import World
from todi.runtime.storage import discard, writing
from todi.teacher.cache_files import CacheStore, CorruptCache, Layout
from todi.teacher.cached import CachedTeacher
from todi.teacher.filling import fill
from todi.teacher.live import LiveTeacher
from todi.teacher.spec import TeacherSpec


class RoundTeacher:
    """Answers for the samples of a round from files that lie in the run's folder; what comes again is not read again.

    The ranks share the reading. A run that goes on finds the files of its state, and so the same numbers to the bit;
    what is not there is read anew.

    Args:
        spec: what the teacher is.
        model: the teacher itself.
        data: answers for the samples of the data; without it, the model reads these too, in every round.
        folder: where the files of each round go: state/rounds/<teacher> of a run.
    """

    takes_packed = True  # a batch is looked up, whatever its layout

    def __init__(self, spec: TeacherSpec, model: LiveTeacher, data: CachedTeacher | None, folder: Path, world: World,
                 device: torch.device):
        self.spec = spec
        self.model = model
        self.data = data
        self.folder = folder
        self.world = world
        self.device = device
        self._stores: dict[int, CacheStore] = {}
        self._places: dict[int, tuple[int, int]] = {}  # round and number in it, by the number of the sample

    def read(self, number: int, samples: Sequence[Example]) -> None:
        """Has the model read samples of round `number`, unless it did so before; every rank calls it alike.

        Raises:
            StorageError: their hidden states cannot be written.
        """
        wanted = {str(sample.sample_id): sample for sample in samples if sample.own or not self.data}
        if not wanted:
            return
        path, checksums = self._path(number), {name: examples_checksum([one]) for name, one in wanted.items()}
        if not self.world.from_main(self.world.is_main and self._has(path, checksums)):
            self._write(path, list(wanted.values()), checksums)
        store = self._stores[number] = CacheStore(path)
        self._places |= {int(name): (number, place) for place, name in enumerate(store.made_from) if name in wanted}

    def forget_before(self, number: int) -> None:
        """Removes the files of the rounds before `number`; every rank calls it alike."""
        for older in [one for one in self._stores if one < number]:
            del self._stores[older]
        self._places = {sample: place for sample, place in self._places.items() if place[0] >= number}
        if self.world.is_main:
            for path in self.folder.glob("round*"):
                if path.name < self._path(number).name:
                    discard(path)

    def rows(self, batch: Batch) -> HeadRows:
        """Raises CorruptCache when a sample is not what was written."""
        samples = [sample for sample in batch.sample_ids.tolist() if sample >= 0]
        hidden = [store.read([place]) for store, place in map(self._place, samples)]
        empty = torch.empty(0, self.spec.layout.width, dtype=self.spec.stored_dtype)
        return HeadRows(torch.cat([empty, *hidden]).to(self.device), self.model.head)

    def expect(self, samples: Sequence[int]) -> None:
        for store, place in map(self._place, samples):
            store.expect([place])

    @property
    def parts(self) -> list[tuple[nn.Module, LinearHead]]:
        return self.model.parts

    def _place(self, sample: int) -> tuple[CacheStore, int]:
        if sample not in self._places:
            return self.data.store, sample
        number, place = self._places[sample]
        return self._stores[number], place

    def _path(self, number: int) -> Path:
        return self.folder / f"round{number:09}"

    def _has(self, path: Path, checksums: dict[str, str]) -> bool:
        """Whether the files of a round hold what this teacher says of these samples."""
        try:
            store = CacheStore(path)
        except (InputError, CorruptCache):
            return False
        return not store.missing() and not store.differences(self.spec.fingerprint) and (
            checksums.items() <= store.made_from.items())

    def _write(self, path: Path, samples: Sequence[Example], checksums: dict[str, str]) -> None:
        layout = Layout(tuple(sample.response_tokens for sample in samples), self.spec.layout.width,
                        self.spec.stored_dtype, shard_samples=-(-len(samples) // self.world.size))
        if self.world.is_main:
            with writing(path):
                # no further up: a run whose folder is gone must say so
                for folder in (self.folder.parents[1], self.folder.parent, self.folder):
                    folder.mkdir(exist_ok=True)
                if path.is_dir():
                    discard(path)
                path.mkdir()
            CacheStore.create(path, self.spec.fingerprint, checksums, layout, head=None)
        self.world.barrier()
        fill(CacheStore(path), self.model, samples,
             partial(collate, pad_id=self.spec.tokenizer.pad_token_id, packed=self.model.takes_packed), self.world,
             self.device, level=logging.DEBUG)
