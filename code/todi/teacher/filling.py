"""The pass with the teacher that fills a cache: what is missing, in shards, over all ranks."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from todi.data.batches import Collate
from todi.data.tokenize import Example
from todi.runtime.distributed import World
from todi.runtime.locks import Lock
from todi.runtime.storage import writing
from todi.runtime.whereabouts import HERE, at
from todi.teacher.cache_files import CacheStore
from todi.teacher.live import LiveTeacher

logger = logging.getLogger(__name__)

# Tokens of a batch, padding included: enough to keep the device busy without a gradient in sight.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_RETRY_SECONDS = 2.0


@contextmanager
def filling_alone(folder: Path, world: World) -> Iterator[None]:
    """Makes `folder`, and keeps other runs from filling the cache in it until the block ends; waits for them first.

    The ranks look together every few seconds, since a collective operation may not wait for as long as a pass takes.

    Raises:
        StorageError: the folder or its lock cannot be written.
    """
    lock = Lock(folder / "lock")
    if world.is_main:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    try:
        waiting = False
        while not world.from_main(world.is_main and _taken(lock)):
            if not waiting:
                logger.info("another run is filling the teacher cache %s; waiting for it", folder)
            waiting = True
            time.sleep(_RETRY_SECONDS)
        yield
    finally:
        lock.release()


def fill(store: CacheStore, teacher: LiveTeacher, examples: Sequence[Example], collate: Collate, world: World,
         device: torch.device, batch_tokens: int | None = None, level: int = logging.INFO) -> None:
    """Runs the teacher over the samples of every shard that is not there; each rank writes its own shards.

    Args:
        batch_tokens: most tokens of a batch, padding included (a sample that is longer has one to itself).
        level: of the log that says how far it is.

    Raises:
        StorageError: a shard cannot be written; those before it stay.
    """
    batch_tokens = batch_tokens or BATCH_TOKENS[device.type]
    started, missing = time.perf_counter(), world.from_main(world.is_main and store.missing())
    for start in range(0, len(missing), world.size):
        with at("the cache pass"), teacher.at_own_pace(world):
            for number in missing[start:start + world.size][world.rank::world.size]:
                samples = store.shards[number]
                hidden = hidden_states(teacher, examples, samples, collate, device, batch_tokens)
                store.write(number, hidden, [examples[sample].response_tokens for sample in samples])
        with at("the cache pass"):
            world.barrier()
        done, seconds = min(start + world.size, len(missing)), time.perf_counter() - started
        logger.log(level, "teacher cache: %d of %d shards, %.1f min, about %.1f min left", done, len(missing),
                   seconds / 60, seconds / 60 / done * (len(missing) - done))


def hidden_states(teacher: LiveTeacher, examples: Sequence[Example], samples: Sequence[int], collate: Collate,
                  device: torch.device, batch_tokens: int) -> Tensor:
    """(N, H) rows of `samples`, one after the other, on the CPU."""
    rows: dict[int, Tensor] = {}
    for batch in batches(examples, samples, batch_tokens):
        rows |= batch_rows(teacher, examples, batch, collate, device)
        HERE.tick()
    return torch.cat([rows[sample] for sample in samples])


def batches(examples: Sequence[Example], samples: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """`samples` in batches of like length and at most `batch_tokens` tokens, or of a single sample."""
    batch: list[int] = []
    for sample in sorted(samples, key=lambda i: len(examples[i].ids)):
        if batch and (len(batch) + 1) * len(examples[sample].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def batch_rows(teacher: LiveTeacher, examples: Sequence[Example], samples: Sequence[int], collate: Collate,
               device: torch.device) -> dict[int, Tensor]:
    """The (rows, H) hidden states of each sample of one batch, on the CPU."""
    hidden = teacher.rows(collate([examples[sample] for sample in samples]).to(device)).hidden.cpu()
    return dict(zip(samples, hidden.split([examples[sample].response_tokens for sample in samples]), strict=True))


def _taken(lock: Lock) -> bool:
    with writing(lock.file):
        return lock.take()
