"""Where this process stands: what it is doing and whether it gets on, for whoever must say so when it no longer can.

    with at("a save"):
        ...

A parent process (runtime/ranks.py) reads it from a file that outlives a SIGKILL. Without a parent it is kept in memory.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from todi.errors import RunError
from todi.runtime.holders import runs
from todi.runtime.lost import peers_are_lost

RANKS_FOLDER = "TODI_RANKS"  # variable: where the parent of the ranks of this node finds what they say of themselves
START = "its start"
_RECORD_BYTES, _PULSE_BYTES = 8192, 32
_LONGEST_TROUBLE = 500  # characters
_LOOK_SECONDS = 0.1


@dataclass
class Record:
    """What is known of a process.

    Attributes:
        place: what it is doing.
        beats: how often it has got on.
        watched: whether it is to get on all the time here; not so while it loads models and reads files.
        waits: for the other ranks, of which another one is late.
        trouble: the error that ends it.
        log: path of its log file.
        pulse: seconds that its heart has beaten; it does though the work does not get on, but not in a frozen process.
    """

    pid: int = 0
    place: str = START
    beats: int = 0
    watched: bool = False
    waits: bool = False
    trouble: str = ""
    log: str = ""
    pulse: int = 0


class Whereabouts:
    """The record of this process, and the file that it is kept in."""

    def __init__(self) -> None:
        self.record = Record(os.getpid())
        self._descriptor: int | None = None

    def keep_in(self, path: Path) -> None:
        """From now on every change is written to `path`."""
        self.record.pid = os.getpid()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._write()

    def move(self, place: str, watched: bool) -> None:
        """The process begins with something else."""
        self.record.place, self.record.watched, self.record.trouble = place, watched, ""
        self.tick()

    def tick(self) -> None:
        """The process gets on with what it does."""
        self.record.beats += 1
        self._write()

    def note(self, error: Exception) -> None:
        """An error is about to end the process; the first one counts, and not what the end of others brings about."""
        if not self.record.trouble and not peers_are_lost(error):
            self.record.trouble = _in_short(error)[:_LONGEST_TROUBLE]
            self._write()

    def note_log(self, path: Path) -> None:
        """Where the process writes its log."""
        self.record.log = str(path.absolute())
        self._write()

    def set_waiting(self, waits: bool) -> None:
        """Whether it waits for the other ranks."""
        self.record.waits = waits
        self.tick()

    def pulse(self, count: int) -> None:
        """Gives a sign of life, from another thread than the one that works: into a part of the file of its own."""
        self.record.pulse = count
        if self._descriptor is not None:
            os.pwrite(self._descriptor, str(count).ljust(_PULSE_BYTES).encode(), _RECORD_BYTES)

    def _write(self) -> None:
        if self._descriptor is not None:
            text = json.dumps(asdict(self.record), ensure_ascii=False).encode("utf-8", "backslashreplace")
            os.pwrite(self._descriptor, text[:_RECORD_BYTES].ljust(_RECORD_BYTES), 0)


HERE = Whereabouts()


@contextmanager
def at(place: str) -> Iterator[None]:
    """Within the block this process does that. After an error it stays there, so that it can be said where it was."""
    before = HERE.record.place, HERE.record.watched
    HERE.move(place, watched=True)
    try:
        yield
    except Exception as error:
        HERE.note(error)
        raise
    HERE.move(*before)


@contextmanager
def waiting() -> Iterator[None]:
    """Within the block this process waits for the other ranks, for as long as they need."""
    HERE.set_waiting(True)
    try:
        yield
    finally:
        HERE.set_waiting(False)


def record_path(folder: Path, rank: int) -> Path:
    """Where a rank says where it stands."""
    return folder / f"rank{rank}"


def read_records(folder: Path) -> dict[int, Record]:
    """What the ranks of this node have said, by rank."""
    paths = {int(path.name.removeprefix("rank")): path for path in folder.glob("rank*") if not path.suffix}
    read = {rank: read_record(path) for rank, path in sorted(paths.items())}
    return {rank: record for rank, record in read.items() if record}


def ended_ranks() -> list[int]:
    """The ranks of this node whose process has ended; none is known of where no parent looks after them."""
    folder = os.environ.get(RANKS_FOLDER)
    return [rank for rank, record in read_records(Path(folder)).items() if not runs(record.pid)] if folder else []


def wait_for_an_end(seconds: float) -> None:
    """Returns when a rank of this node has ended; after so many seconds where none does, or none would be known of."""
    for _ in range(round(seconds / _LOOK_SECONDS)):
        if ended_ranks():
            return
        time.sleep(_LOOK_SECONDS)


def read_record(path: Path) -> Record | None:
    """What a process wrote; None where it has not yet."""
    try:
        content = path.read_bytes()
        record = Record(**json.loads(content[:_RECORD_BYTES]))
    except (OSError, ValueError, TypeError):  # none, or one that is being written
        return None
    record.pulse = int(content[_RECORD_BYTES:].strip() or 0)
    return record


def _in_short(error: Exception) -> str:
    if isinstance(error, RunError):
        return "; ".join(error.problems)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
