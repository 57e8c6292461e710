"""What a run says of itself while it runs, on standard output and in the log file of its folder."""

import logging
import logging.handlers
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers

from todi.errors import RunError
from todi.runtime.lost import peers_are_lost
from todi.runtime.signals import Interrupted
from todi.runtime.storage import writing
from todi.runtime.whereabouts import HERE

_FORMAT = logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")


def set_up_logging(is_main: bool) -> None:
    """This project's log lines, with a time, on standard output of the main process; its warnings from the others.

    Other libraries keep to their warnings, and show no progress bars of their own. What is said before there is a
    log file is kept for it.
    """
    shown = logging.StreamHandler(sys.stdout)
    shown.setFormatter(_FORMAT)
    ours = logging.getLogger("todi")
    ours.handlers, ours.propagate = [shown, Backlog()], False
    ours.setLevel(logging.INFO if is_main else logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Until the block ends, log lines are appended to `path` too, and with them the error that ends it.

    Several ranks may write to one file.

    Raises:
        StorageError: it cannot be opened.
    """
    with writing(path):
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    HERE.note_log(path)
    file.setFormatter(_FORMAT)
    ours = logging.getLogger("todi")
    for backlog in [handler for handler in ours.handlers if isinstance(handler, Backlog)]:
        backlog.setTarget(file)
        backlog.close()
        ours.removeHandler(backlog)
    ours.addHandler(file)
    try:
        yield
    except Interrupted:
        raise  # an end that was asked for, and has been said
    except Exception as error:
        file.append(_account_of(error))
        raise
    finally:
        ours.removeHandler(file)
        file.close()


class Backlog(logging.handlers.MemoryHandler):
    """Keeps all log lines until it has a target."""

    def __init__(self):
        super().__init__(capacity=0)

    def shouldFlush(self, record: logging.LogRecord) -> bool:
        return False


class _LogFile(logging.FileHandler):
    """A log file that a full disk or a vanished folder makes no fuss about: the run goes on and says so elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: what matters is on standard output too."""

    def append(self, text: str) -> None:
        """Adds text as it is."""
        with suppress(OSError):
            self.stream.write(text)
            self.flush()


def _account_of(error: Exception) -> str:
    """What is worth keeping of what ended a run: for an expected end a line for each problem, else the traceback."""
    if isinstance(error, RunError):
        return "".join(f"error: {problem}\n" for problem in error.problems)
    if peers_are_lost(error):
        return f"error: the other ranks were lost in {HERE.record.place}\n"
    return "".join(traceback.format_exception(error))


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30


def peak_resident_bytes() -> int:
    """Most RAM that this process has held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # macOS counts bytes
