"""A process whose launcher has gone, by SIGKILL or with its terminal, ends too.

No signal tells a child of its parent's end, but on Linux, so it looks.
"""

import os
from dataclasses import dataclass

from todi.runtime.holders import runs

PARENT = "TODI_PARENT"  # variable: process id of the launcher, or of the parent of all ranks of this node

GRACE = 60  # seconds that a process without one has to end by itself; torchrun's agent would give its ranks 30


@dataclass(frozen=True)
class Parent:
    """The process that this one belongs to.

    Attributes:
        is_direct: it is what the system takes for the parent; else a command stands between the two.
    """

    pid: int
    is_direct: bool

    def is_gone(self) -> bool:
        """Whether it has ended, also where nobody has asked for its exit code yet."""
        if self.is_direct:
            return os.getppid() != self.pid
        return not runs(self.pid)


def parent_from_environment() -> Parent | None:
    """Whoever started this process and is to outlive it; None for a process that was started by hand."""
    text = os.environ.get(PARENT, "")
    return Parent(int(text), os.getppid() == int(text)) if text.isdecimal() else None
