"""The files of a teacher cache. A cache is a folder with

    cache.json        what made it (the fingerprint), the shape of what it holds, the samples of each shard
    head.safetensors  weight and bias of the teacher's head, where it is kept with them
    shard00000/       a run of samples: complete, or not there
      hidden.bin        the (rows, H) numbers of one sample after the other, as they lie in memory
      index.json        number of rows and CRC-32 of each sample
    lock              there while somebody fills it

The samples of each shard follow from the samples alone, so that any number of processes may fill it, today or later.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from todi.criterions import LinearHead
from todi.errors import InputError, RunError
from todi.runtime.device import DTYPES, name_of
from todi.runtime.storage import publish, sweep, unfinished, write_text, writing

SHARD_BYTES = 256 << 20
SHARD_SAMPLES = 256  # so that several ranks find something to do, and little is lost when a pass is cut short
OPEN_FILES = 64
_READ_AT_ONCE = 1 << 30  # Linux reads no more than 2 GiB in one call


class CorruptCache(RunError):
    """A cache does not hold what was written to it. The message names the file, and the sample where there is one."""


@dataclass(frozen=True)
class Layout:
    """How much a cache holds.

    Attributes:
        rows: labelled positions of each sample.
        width: numbers in a hidden state, H.
        dtype: of these numbers as they are stored.
        shard_samples: most samples of a shard; `SHARD_SAMPLES` by default.
    """

    rows: tuple[int, ...]
    width: int
    dtype: torch.dtype
    shard_samples: int | None = None

    @property
    def bytes_per_row(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Of the hidden states; index and head come to it."""
        return sum(self.rows) * self.bytes_per_row

    def shards(self) -> Iterator[range]:
        """The samples of each shard."""
        first, size, most = 0, 0, self.shard_samples or SHARD_SAMPLES
        for sample, rows in enumerate(self.rows):
            size += rows * self.bytes_per_row
            if sample > first and (size > SHARD_BYTES or sample - first == most):
                yield range(first, sample)
                first, size = sample, rows * self.bytes_per_row
        yield range(first, len(self.rows))


class _Place(NamedTuple):
    """Where a sample lies: `start` in bytes within the file of its shard, and the CRC-32 of its rows."""

    shard: int
    start: int
    rows: int
    crc: int


class CacheStore:
    """Reads and writes one cache. Opening and reading write nothing, so a cache may lie on a read-only disk.

    Attributes:
        fingerprint: what the hidden states depend on, by name; JSON values.
        made_from: the settings that name the teacher and the data, for `todi.cache verify`.
        width: numbers in a hidden state, H.
        dtype: of these numbers.
        shards: the samples of each shard.
    """

    def __init__(self, folder: Path):
        """Raises InputError when there is no cache in `folder`, CorruptCache when its description is damaged."""
        self.folder = folder
        file = folder / "cache.json"
        if not file.is_file():
            raise InputError(f"no teacher cache at {folder}: {file.name} is not there")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            self.fingerprint, self.made_from = record["fingerprint"], record["made_from"]
            self.width, self.dtype = record["width"], DTYPES[record["dtype"]]
            self.shards = [range(*pair) for pair in zip(record["shards"], record["shards"][1:], strict=False)]
            self._head = record["head"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCache(f"{file} is damaged ({error!r}); remove {folder} to make it anew") from None
        self._checked: set[int] = set()
        self._file = lru_cache(OPEN_FILES)(self._open)

    @classmethod
    def create(cls, folder: Path, fingerprint: Mapping[str, Any], made_from: Mapping[str, Any], layout: Layout,
               head: LinearHead | None) -> "CacheStore":
        """A cache without any shard yet, in a folder that exists.

        Args:
            head: None where whoever reads it has the teacher's head already.

        Raises:
            StorageError: it cannot be written.
        """
        starts = [samples.start for samples in layout.shards()] + [len(layout.rows)]
        record = {"fingerprint": fingerprint, "made_from": made_from, "width": layout.width,
                  "dtype": name_of(layout.dtype), "shards": starts,
                  "head": head and _write_head(folder / "head.safetensors", head)}
        write_text(folder / "cache.json", json.dumps(record, indent=1) + "\n")
        return cls(folder)

    def differences(self, fingerprint: Mapping[str, Any]) -> list[str]:
        """What `fingerprint` has otherwise than the cache, in words."""
        now = json.loads(json.dumps(fingerprint))
        return [f"{name} was {_shown(self.fingerprint.get(name))}, is {_shown(now.get(name))}"
                for name in self.fingerprint | now if self.fingerprint.get(name) != now.get(name)]

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        return [number for number in range(len(self.shards)) if not self._shard(number).is_dir()]

    def sweep(self) -> None:
        """Removes what an interrupted pass left half-made; only for who holds the lock."""
        sweep(self.folder)

    def write(self, number: int, hidden: Tensor, rows: Sequence[int]) -> None:
        """Adds a shard.

        Args:
            hidden: (sum of rows, H) on the CPU, sample after sample.
            rows: of each sample.

        Raises:
            StorageError: it cannot be written.
        """
        data = memoryview(hidden.to(self.dtype).contiguous().view(torch.uint8).flatten().numpy())
        per_row = self.width * self.dtype.itemsize
        crcs, start = [], 0
        for count in rows:
            crcs.append(zlib.crc32(data[start:start + count * per_row]))
            start += count * per_row
        draft = unfinished(self._shard(number))
        with writing(draft):
            draft.mkdir()
            (draft / "hidden.bin").write_bytes(data)
            (draft / "index.json").write_text(json.dumps({"rows": list(rows), "crc32": crcs}), encoding="utf-8")
            publish(self._shard(number))

    def head(self, device: torch.device) -> LinearHead:
        """The teacher's head. Raises CorruptCache, and InputError where it was kept without one."""
        if not self._head:
            raise InputError(f"{self.folder} has no head: it is what a run keeps of a round, of use to that run alone")
        file = self.folder / "head.safetensors"
        try:
            crc = _file_crc(file)
            tensors = load_file(file, device=str(device)) if crc == self._head["crc32"] else None
        except (OSError, SafetensorError) as error:
            raise CorruptCache(f"{file}: {error}") from None
        if tensors is None:
            raise CorruptCache(f"{file} fails its checksum; remove {self.folder} to make it anew")
        return LinearHead(tensors["weight"], tensors.get("bias"), self._head["softcap"], self._head["scale"])

    @cached_property
    def places(self) -> list[_Place]:
        """Where each sample lies, of a cache that misses no shard.

        Raises:
            CorruptCache: an index is damaged, or a shard is shorter or longer than its index says.
        """
        return [place for number in range(len(self.shards)) for place in self._index(number)]

    def read(self, samples: Sequence[int]) -> Tensor:
        """(N, H) rows of these samples, one after the other; a sample is checked the first time that it is read.

        Raises:
            CorruptCache: a sample fails its checksum, or its shard is cut short.
        """
        hidden = torch.empty(sum(self.places[sample].rows for sample in samples), self.width, dtype=self.dtype)
        data = memoryview(hidden.view(torch.uint8).flatten().numpy())
        start = 0
        for sample in samples:
            end = start + self._bytes(sample)
            self._read_sample(sample, data[start:end])
            start = end
        return hidden

    def expect(self, samples: Sequence[int]) -> None:
        """Asks the operating system to fetch these samples, in the background."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for sample in samples:
            place = self.places[sample]
            os.posix_fadvise(self._file(place.shard).fileno(), place.start, self._bytes(sample),
                             os.POSIX_FADV_WILLNEED)

    def check(self) -> Iterator[str]:
        """Reads the head and every sample of every shard that is there; a sentence for each that is wrong."""
        try:
            self.head(torch.device("cpu"))
        except CorruptCache as error:
            yield str(error)
        for number in sorted(set(range(len(self.shards))) - set(self.missing())):
            try:
                places = self._index(number)
            except CorruptCache as error:
                yield str(error)
                continue
            for sample, place in zip(self.shards[number], places, strict=True):
                data = memoryview(bytearray(place.rows * self.width * self.dtype.itemsize))
                try:
                    self._fill(sample, place, data)
                except CorruptCache as error:
                    yield str(error)

    def _read_sample(self, sample: int, data: memoryview) -> None:
        if sample in self._checked:
            self._fill(sample, self.places[sample], data, check=False)
        else:
            self._fill(sample, self.places[sample], data)
            self._checked.add(sample)

    def _fill(self, sample: int, place: _Place, data: memoryview, check: bool = True) -> None:
        """Reads one sample into `data`, whose length is the sample's."""
        file, done = self._file(place.shard).fileno(), 0
        while done < len(data):
            count = os.preadv(file, [data[done:done + _READ_AT_ONCE]], place.start + done)
            if count == 0:
                raise self._corrupt(place.shard, f"is cut short within sample {sample}")
            done += count
        if check and zlib.crc32(data) != place.crc:
            raise self._corrupt(place.shard, f"sample {sample} fails its checksum")

    def _index(self, number: int) -> list[_Place]:
        """Where the samples of one shard lie."""
        shard = self._shard(number)
        try:
            index = json.loads((shard / "index.json").read_text(encoding="utf-8"))
            entries = list(zip(self.shards[number], index["rows"], index["crc32"], strict=True))
            size = (shard / "hidden.bin").stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._corrupt(number, f"has a damaged index ({error!r})") from None
        places, start = [], 0
        for _, rows, crc in entries:
            places.append(_Place(number, start, rows, crc))
            start += rows * self.width * self.dtype.itemsize
        if size != start:
            raise self._corrupt(number, f"has {size} bytes and should have {start}")
        return places

    def _bytes(self, sample: int) -> int:
        return self.places[sample].rows * self.width * self.dtype.itemsize

    def _corrupt(self, number: int, what: str) -> CorruptCache:
        shard = self._shard(number)
        return CorruptCache(f"{shard / 'hidden.bin'}: {what}; remove {shard}, and the next run makes that shard anew")

    def _open(self, number: int):
        return (self._shard(number) / "hidden.bin").open("rb", buffering=0)

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard{number:05}"


def _shown(value: Any) -> str:
    """A value of a fingerprint; of a checksum its beginning."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _write_head(file: Path, head: LinearHead) -> dict[str, Any]:
    """Writes its tensors; what `cache.json` says of it."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    with writing(file):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished(file))
        publish(file)
    return {"crc32": _file_crc(file), "softcap": head.softcap, "scale": head.scale}


def _file_crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as opened:
        while piece := opened.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc
