"""Who may write to a folder: one process at a time, also where several machines share it.

The lock is a file that says who holds it. It is made with O_EXCL, which succeeds for one process alone, over NFS (since
version 3) as well; flock on a folder, which it takes the place of, fails there. Its time of change is the holder's
heartbeat, by the clock of the file system, so that clocks of machines may differ. A lock that nobody holds any more is
taken over: on one machine as soon as the process is gone, from another machine when there was no heartbeat for `STALE`.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from todi.errors import InputError
from todi.runtime.holders import BEAT, STALE, Holder, Seen, lock_of, look_at, now_in
from todi.runtime.storage import writing

logger = logging.getLogger(__name__)

_LOOK = 1.0  # seconds between two looks at another machine's lock
_TAKEOVER = 30.0  # seconds that taking over a lock can last at most


class Lock:
    """A lock file, taken and given back by one process. Its folder must be there."""

    def __init__(self, file: Path):
        self.file = file
        self._text = json.dumps(asdict(Holder.this_process()))
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self) -> bool:
        """Takes it if nobody holds it, from one who is gone too. Raises OSError where no file can be made."""
        while not self._create():
            seen = look_at(self.file)
            if seen and not seen.is_dead:
                return False
            if seen:
                self._put_aside(seen)
        self._heart = threading.Thread(target=self._beat, name="todi lock", daemon=True)
        self._heart.start()
        return True

    def release(self) -> None:
        """Gives it back, if it was taken."""
        if not self._heart:
            return
        self._ended.set()
        self._heart.join()
        self._heart = None
        with suppress(OSError):  # of a folder that is gone or cannot be written; what ends the run says so
            if self._is_ours():
                self.file.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
                opened.write(self._text)
        except OSError:  # a full disk: nobody could tell whose it is
            with suppress(OSError):
                self.file.unlink()
            raise
        return True

    def _put_aside(self, seen: Seen) -> None:
        """Removes a lock of one who is gone. One process at a time does: another's new lock must not go with it."""
        gate = self.file.with_name(f"{self.file.name}-takeover")
        try:
            os.close(os.open(gate, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            with suppress(FileNotFoundError):
                if now_in(gate.parent) - gate.stat().st_mtime > _TAKEOVER:  # it was killed here
                    gate.unlink()
            time.sleep(_LOOK / 20)
            return
        try:
            again = look_at(self.file)
            if again and again.text == seen.text and again.is_dead:
                self.file.unlink()
                logger.info("took over %s of %s, which is gone (last heartbeat %.0f s ago)", self.file, seen, seen.age)
        finally:
            gate.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # a mount that is gone for a while
                if not self._is_ours():
                    logger.error("%s is another process's now: this one had given no sign for %.0f s, and both may be "
                                 "writing", self.file, STALE)
                    return
                os.utime(self.file)

    def _is_ours(self) -> bool:
        with suppress(FileNotFoundError):
            return self.file.read_text(encoding="utf-8", errors="replace") == self._text
        return False


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes a folder, and until the block ends keeps other runs from claiming it.

    Raises:
        InputError: another run has claimed it; names it.
        StorageError: it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(lock_of(folder))
    with writing(lock.file):
        check_unclaimed(folder)
        taken = lock.take()
    if not taken:
        check_unclaimed(folder)
        raise InputError(f"another run is writing to {folder}")  # which has just ended
    try:
        yield
    finally:
        lock.release()


def check_unclaimed(folder: Path) -> None:
    """Raises InputError where a run that lives has claimed the folder.

    For a process of another machine it waits for the next heartbeat, which shows that it lives, or until it is clear
    that there will be none.
    """
    file = lock_of(folder)
    first = seen = look_at(file)
    if first and first.may_be_dead:
        logger.info("%s is locked by %s; looking for up to %.0f s whether it lives", folder, first, STALE)
    while seen and first and seen.may_be_dead and seen.text == first.text and seen.age >= first.age:
        time.sleep(_LOOK)
        first, seen = seen, look_at(file)
    if seen and not seen.is_dead:
        raise InputError(f"another run is writing to {folder}: {seen} (its lock is {file})")
