"""Looks after the ranks of a node while they run: ends them when one hangs, or when their launcher has gone."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from todi.runtime.hangs import Hang, HangWatch
from todi.runtime.heartbeat import DUMP_SIGNAL, stacks_path
from todi.runtime.parent import GRACE, Parent
from todi.runtime.whereabouts import Record, read_records

_SECOND = 1.0
_DUMP_SECONDS = 2.0  # for a rank to write its stacks, which takes milliseconds
_LOOK_SECONDS = 0.05


class Nurse:
    """Within its block, a thread looks every second at what the ranks say of themselves in the files of `folder`.

    Args:
        limit: seconds without progress that are too many; 0 for none.
        launcher: whoever started this process; its end ends the ranks.

    Attributes:
        verdict: why the ranks were ended, if it was done here.
    """

    def __init__(self, folder: Path, limit: float, launcher: Parent | None):
        self.folder = folder
        self.launcher = launcher
        self.watch = HangWatch(limit)
        self.verdict = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="nurse", daemon=True)

    def __enter__(self) -> "Nurse":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def final_verdict(self) -> str:
        """`verdict`, when all that belongs to it has been shown."""
        self._over.set()
        self._thread.join()
        return self.verdict

    def _look_after(self) -> None:
        while not self._over.wait(_SECOND):
            if self.launcher and self.launcher.is_gone():
                _send(signal.SIGTERM, self._records().values())
                if not self._over.wait(GRACE):
                    os.kill(os.getpid(), signal.SIGTERM)  # the agent ends the ranks, then itself
                return
            records = self._records()
            if hangs := self.watch.look(records):
                self._end(hangs, records)
                return

    def _records(self) -> dict[int, Record]:
        return read_records(self.folder)

    def _end(self, hangs: Sequence[Hang], records: Mapping[int, Record]) -> None:
        """Has all ranks write their stacks, kills them, and shows what they wrote."""
        self.verdict = (f"{'; '.join(map(str, hangs))} (HANG_TIMEOUT={self.watch.limit:g}). The stacks of all ranks "
                        "are above and in the log")
        self._have_stacks_written_and_kill(records, {hang.rank for hang in hangs if hang.frozen})
        stacks = "".join(self._stacks(rank, record) for rank, record in records.items())
        print(stacks, end="", file=sys.stderr, flush=True)
        for log in {record.log for record in records.values()} - {""}:
            with suppress(OSError), open(log, "a", encoding="utf-8") as file:
                file.write(stacks)

    def _have_stacks_written_and_kill(self, records: Mapping[int, Record], frozen: Collection[int]) -> None:
        """A process that was stopped writes its stacks when it is continued: when the others have gone."""
        for record in records.values():
            _ask_for_stacks(record.pid)
        time.sleep(_DUMP_SECONDS)
        _send(signal.SIGKILL, [record for rank, record in records.items() if rank not in frozen])
        for rank in frozen:
            _send(signal.SIGCONT, [records[rank]])
            _wait_for_text(stacks_path(self.folder, rank))
            _send(signal.SIGKILL, [records[rank]])

    def _stacks(self, rank: int, record: Record) -> str:
        text = ""
        with suppress(OSError):
            text = stacks_path(self.folder, rank).read_text(errors="replace")
        return f"rank {rank} (pid {record.pid}) is in {record.place}; its stacks:\n{text or 'it wrote none'}\n"


def _wait_for_text(path: Path) -> None:
    """Returns when a file grows no more, or when nothing comes."""
    size, end = 0, time.monotonic() + _DUMP_SECONDS
    while time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
        before, size = size, path.stat().st_size if path.is_file() else 0
        if size and size == before:
            return


def _ask_for_stacks(pid: int) -> None:
    """Asks the first thread, which does the work. A signal for the whole process may come to any thread, and while that
    one writes, the first one of a process that was stopped has gone on."""
    try:
        ctypes.CDLL(None).tgkill(pid, pid, DUMP_SIGNAL)
    except AttributeError:  # the system's library has no such call
        with suppress(ProcessLookupError):
            os.kill(pid, DUMP_SIGNAL)


def _send(number: int, records: Iterable[Record]) -> None:
    for record in records:
        with suppress(ProcessLookupError):
            os.kill(record.pid, number)
