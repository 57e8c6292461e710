"""Who holds a lock, by its file, and whether that process lives. Nothing here imports much: launchers look too."""

import json
import os
import socket
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BEAT = 30.0  # seconds between two heartbeats
STALE = 300.0  # seconds without a heartbeat, after which another machine's lock is nobody's
_PROC = Path("/proc")


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        processes: of which set of processes `pid` is one, where there are several on a host (containers), else "".
        started: when, in the system's own count; "" where it does not tell.
        token: what no other holder has.
    """

    host: str
    pid: int
    processes: str
    started: str
    token: str

    @classmethod
    def this_process(cls) -> "Holder":
        """A new holder."""
        return cls(socket.gethostname(), os.getpid(), _processes(), _state_and_start(os.getpid())[1], uuid.uuid4().hex)

    @property
    def is_here(self) -> bool:
        """Whether this machine would know of its process."""
        return (self.host, self.processes) == (socket.gethostname(), _processes())

    @property
    def lives(self) -> bool:
        """Whether the process is there; only for one that is here. A number may have been given to another since."""
        started = _state_and_start(self.pid)[1]
        return runs(self.pid) and (not started or not self.started or started == self.started)


@dataclass(frozen=True)
class Seen:
    """A lock file as it was found; `holder` is None where its text is not (yet) what a holder writes."""

    text: str
    holder: Holder | None
    age: float  # seconds since the last heartbeat

    @property
    def is_dead(self) -> bool:
        if self.holder and self.holder.is_here:
            return not self.holder.lives
        return self.age > STALE

    @property
    def may_be_dead(self) -> bool:
        """Whether only time can tell."""
        return not self.is_dead and not (self.holder and self.holder.is_here)

    @property
    def seems_alive(self) -> bool:
        """What a look tells without waiting: of another machine's, whether no heartbeat is overdue."""
        if self.holder and self.holder.is_here:
            return self.holder.lives
        return self.age < 2 * BEAT

    def __str__(self) -> str:
        if not self.holder:
            return "a process that has not said yet which it is"
        return f"process {self.holder.pid} on {self.holder.host}"


def runs(pid: int) -> bool:
    """Whether a process of that number is there and has not ended, also where nobody has asked for its exit code."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return _state_and_start(pid)[0] not in ("Z", "X")


def lock_of(folder: Path) -> Path:
    """The lock file of a folder that one run at a time writes to."""
    return folder / ".lock"


def writer_of(folder: Path) -> Seen | None:
    """The lock of whoever seems to be writing to the folder now; None where nobody does, or the lock cannot be read.
    `todi.runtime.locks.check_unclaimed` makes sure, which may take minutes."""
    with suppress(OSError):
        seen = look_at(lock_of(folder))
        return seen if seen and seen.seems_alive else None
    return None


def look_at(file: Path) -> Seen | None:
    """None where there is no lock."""
    try:
        text, changed = file.read_text(encoding="utf-8", errors="replace"), file.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        holder = None
    return Seen(text, holder, now_in(file.parent) - changed)


def now_in(folder: Path) -> float:
    """What the clock of the folder's file system says, which may be another machine's; ours if none can be asked."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as made:
            return os.fstat(made.fileno()).st_mtime
    except OSError:
        return time.time()


def _processes() -> str:
    with suppress(OSError):  # of two machines of one name only the number that each gives itself as it starts differs
        return f"{os.readlink(_PROC / 'self/ns/pid')} {(_PROC / 'sys/kernel/random/boot_id').read_text().strip()}"
    return ""


def _state_and_start(pid: int) -> tuple[str, str]:
    """One letter, and a number; empty where the system does not tell."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
