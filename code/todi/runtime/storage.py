"""Files and folders that are there in full or not at all, whenever the process or the machine stops."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from todi.errors import StorageError
from todi.runtime.lost import peers_are_lost

# Hidden, so that no pattern of finished folders finds them; swept away when the run goes on.
_UNFINISHED, _DISCARDED = ".unfinished", ".discarded"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names `path` in whatever a full disk, a read-only folder or a vanished mount makes the libraries raise.

    What was written so far as `unfinished(path)` is removed: a full disk needs the room. That another rank has ended is
    no matter of the path, and is raised as it is.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError for a full disk
        if peers_are_lost(error):
            raise
        with suppress(OSError):
            _remove(unfinished(path))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StorageError(f"cannot write {path}: {reason}; what was saved before is untouched") from error


def unfinished(path: Path) -> Path:
    """The name beside `path` under which it is written."""
    return path.with_name(f".{path.name}{_UNFINISHED}")


def publish(path: Path) -> None:
    """Gives what was written as `unfinished(path)` its name, once it is safely on the disk.

    An older folder of that name makes way.
    """
    for entry in unfinished(path).rglob("*"):
        make_durable(entry)
    publish_durable(path)


def publish_durable(path: Path) -> None:
    """The same where whoever wrote what lies in a folder has made it durable: nobody need look at all of it."""
    source = unfinished(path)
    make_durable(source)
    if path.is_dir():
        discard(path)
    source.rename(path)
    make_durable(path.parent)


def make_durable(path: Path) -> None:
    """Has the disk hold what was written to a file, or which names a folder has. Another machine cannot see to that
    for who wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a small file, in full or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """The same with its bytes."""
    with writing(path):
        unfinished(path).write_bytes(content)
        publish(path)


def discard(folder: Path) -> None:
    """Deletes a folder; halfway through it has no longer its name."""
    shutil.rmtree(set_aside(folder))


def set_aside(folder: Path) -> Path:
    """Takes a folder's name away; where it lies to be deleted."""
    doomed = folder.with_name(f".{folder.name}{_DISCARDED}")
    shutil.rmtree(doomed, ignore_errors=True)
    return folder.rename(doomed)


def sweep(folder: Path) -> None:
    """Removes what an interrupted process left in `folder`."""
    for entry in folder.glob(".*"):
        if entry.name.endswith((_UNFINISHED, _DISCARDED)):
            _remove(entry)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
