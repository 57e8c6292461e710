"""Whether a folder is the same one on all nodes: each leaves a mark in it, and looks for the marks of the others.

A run writes its state from all ranks into one folder. Where that is another folder on each node, the state would look
whole and lie in parts, and resuming would find that out.
"""

import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from todi.errors import InputError

logger = logging.getLogger(__name__)

PATIENCE = 20.0  # seconds until a file that one node made must be there for the others; NFS takes a few
_LOOK = 0.25  # seconds between two looks


class Party(Protocol):
    """Those who look: the nodes of a `Meeting`, or the ranks of a `World`."""

    rank: int

    def gather(self, value: Any) -> list[Any]:
        """`value` of each, in their order, for each."""


def check_shared(folders: Sequence[Path], party: Party, kind: str = "node", marks: bool = True) -> None:
    """Makes sure that all see what each of them writes to `folders`; leaves nothing behind.

    Args:
        folders: of the first of the party; what the others say does not count.
        kind: what one of the party is called.
        marks: whether this one leaves a mark; several ranks of one node need only one.

    Raises:
        InputError: a folder is another one somewhere, or cannot be written; names the node. On everyone.
    """
    problems = []
    for folder in map(Path, party.gather([str(folder) for folder in folders])[0]):
        problems += _problems(folder, party, kind, marks)
    if problems:
        raise InputError(problems)


def _problems(folder: Path, party: Party, kind: str, marks: bool) -> list[str]:
    """What is wrong with one folder, the same sentences for everyone."""
    trace = _Trace(folder)
    try:
        failure = trace.leave() if marks else None
        left = party.gather([socket.gethostname(), failure, trace.name if marks and not failure else None])
        others = {number: name for number, (_, _, name) in enumerate(left) if name and number != party.rank}
        unseen = trace.unseen(others) if marks and not failure else []
        missed = party.gather(unseen)
        trace.remove_mark()
        party.gather(None)  # while one's mark is there, nobody else can remove the folder
    finally:
        trace.remove_mark()
        trace.remove_folders()
    party.gather(None)  # nobody makes the folder anew while another one still removes it
    failures = [f"{kind} {number} ({host}) cannot write to {folder}: {failure}"
                for number, (host, failure, _) in enumerate(left) if failure]
    apart = sorted({number for number, unseen in enumerate(missed) if 0 in unseen} | set(missed[0]))
    return failures + [f"{folder} is another folder on {kind} {number} ({left[number][0]}) than on {kind} 0 "
                       f"({left[0][0]}): put it on a file system that all nodes share" for number in apart]


@dataclass
class _Trace:
    """What one leaves in a folder, and takes away again.

    Attributes:
        name: of the mark.
        made: folders that were not there.
    """

    folder: Path
    name: str = field(default_factory=lambda: f".seen-{uuid.uuid4().hex}")
    made: list[Path] = field(default_factory=list)

    def leave(self) -> str | None:
        """Makes the folder and the mark; why that was not possible, if so."""
        try:
            self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / self.name).touch()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def unseen(self, others: dict[int, str]) -> list[int]:
        """Whose marks cannot be found in `PATIENCE`."""
        started = time.monotonic()
        while True:
            (self.folder / self.name).touch()
            there = set(os.listdir(self.folder))
            missing = [number for number, name in others.items() if name not in there]
            if not missing or time.monotonic() - started > PATIENCE:
                return missing
            time.sleep(_LOOK)

    def remove_mark(self) -> None:
        """If it is there."""
        with suppress(OSError):
            (self.folder / self.name).unlink()

    def remove_folders(self) -> None:
        """Those that were made, and that nobody has put anything into."""
        for path in self.made:
            with suppress(OSError):
                path.rmdir()
