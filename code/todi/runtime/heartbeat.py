"""What a process does every second beside its work: says that it lives, and looks whether it is still wanted.

- In the folder of a run, heartbeat/rank<N> tells a watcher where the rank stands. It is written every 15 seconds.
- A process whose launcher has gone stops as by SIGTERM.
- A process without fellows that no longer gets on ends itself; of several, their parent sees to it (runtime/ranks.py).
"""

import faulthandler
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from todi.runtime.distributed import World
from todi.runtime.hangs import Hang, HangWatch, timeout_from_environment
from todi.runtime.parent import GRACE, Parent, parent_from_environment
from todi.runtime.signals import Interrupted
from todi.runtime.whereabouts import HERE, RANKS_FOLDER, record_path

logger = logging.getLogger(__name__)

DUMP_SIGNAL = signal.SIGUSR2  # has a rank write its stacks
_SECOND = 1.0
_FILE_EVERY = 15  # seconds

_file: Path | None = None  # of the heartbeat
_started = False


def start_heart(world: World) -> None:
    """Starts it, once, for the rest of the process. For a command's own process; a library's caller has its own."""
    global _started
    if _started:
        return
    _started = True
    folder = os.environ.get(RANKS_FOLDER)
    if folder:
        HERE.keep_in(record_path(Path(folder), world.rank))
        # stays open: the handler writes to it when nothing else works any more
        stacks = stacks_path(Path(folder), world.rank).open("w")
        faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True)
    parent = parent_from_environment()
    alone = HangWatch(timeout_from_environment()) if parent and not folder else None
    threading.Thread(target=_beat, args=(world.rank, parent, alone), name="heart", daemon=True).start()


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return folder / f"rank{rank}.stacks"


@contextmanager
def heartbeat_in(folder: Path, rank: int) -> Iterator[None]:
    """Until the block ends, keeps folder/heartbeat/rank<N>, unless the folder cannot be written.

    It is left where an error ends the block: its time says when, and its text where.
    """
    global _file
    if not _started:  # by the library, whose caller looks after the process
        yield
        return
    path = _file = folder / "heartbeat" / f"rank{rank}"
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        _write_file(rank, 0)
    try:
        yield
        _remove(path)
    except Interrupted:
        _remove(path)
        raise
    finally:
        _file = None


def clear_heartbeats(folder: Path) -> None:
    """Removes what a run that broke off has left; for the first rank, before the others begin."""
    for path in (folder / "heartbeat").glob("rank*"):
        _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
        path.parent.rmdir()  # fails, as it is to, where others have not finished


def _beat(rank: int, parent: Parent | None, alone: HangWatch | None) -> None:
    beats, since = -1, time.monotonic()
    for second in itertools.count(1):
        time.sleep(_SECOND)
        HERE.pulse(second)
        if HERE.record.beats != beats:
            beats, since = HERE.record.beats, time.monotonic()
        if second % _FILE_EVERY == 0:
            _write_file(rank, time.monotonic() - since)
        if parent and parent.is_gone():
            _end_without(parent)
        if alone and (hangs := alone.look({rank: HERE.record})):
            _end_hanging(hangs[0])


def _write_file(rank: int, seconds: float) -> None:
    path = _file
    if path is None:
        return
    said = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "place": HERE.record.place,
            "waits": HERE.record.waits, "seconds_without_progress": round(seconds)}
    with suppress(OSError):  # a full disk or a vanished folder ends the work, not its watcher
        path.write_text(json.dumps(said) + "\n", encoding="utf-8")


def _end_without(parent: Parent) -> None:
    """Ends this process like a request to stop, and if it does not heed that, all the same."""
    with suppress(Exception):  # its output may have gone with the launcher
        logger.warning("the process that started this one (pid %d) has gone; stopping", parent.pid)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _end_hanging(hang: Hang) -> None:
    """Says where the work stands, in the log too, and ends the process: an exception would not reach it."""
    said = f"error: {hang} (HANG_TIMEOUT); this process ends"
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    print(said, file=sys.stderr, flush=True)
    if HERE.record.log:
        with suppress(OSError), open(HERE.record.log, "a", encoding="utf-8") as log:
            faulthandler.dump_traceback(file=log, all_threads=True)
            log.write(f"{said}\n")
    os._exit(1)
