"""The folder of a run that goes on with other devices, or spread over them otherwise, so that its name differs now."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from todi.runtime.holders import writer_of

# Parts of a run's name that say how it is spread, not what it computes.
SPREAD = ("zero_stage", "offload", "global_batch_size")


class Shape(NamedTuple):
    """What a run's name says of its steps.

    Attributes:
        batch, accumulation, devices: of a step, whose product is its samples.
        total: samples of a step, where they were given instead; else 0.
    """

    batch: int
    accumulation: int
    devices: int
    total: int

    def goes_on(self, then: "Shape") -> bool:
        """Whether a run of this shape goes on with one of that: their steps have as many samples, or only the devices
        differ, and the steps stay what they were."""
        return self.samples == then.samples or (self.total == then.total == 0 and self[:2] == then[:2])

    @property
    def samples(self) -> int:
        """Of a step."""
        return self.total or self.batch * self.accumulation * self.devices


class Found(NamedTuple):
    """Where a run goes on.

    Attributes:
        folder: of the run.
        busy: a sentence for each run that a process is writing to and that would else come first, or that is taken all
            the same, because there is no other.
    """

    folder: str
    busy: Sequence[str] = ()


def folder_to_go_on_in(named: str) -> Found:
    """Of a run that would be in the folder `named`, the one that it goes on in.

    It is that one if it is there. Else it may be one beside it, of a run that has states but no end, and whose name
    differs only in how it is spread: the one that wrote last, of those that no process is writing to where there is
    such a one. A name so long that it was cut off is only found as it is.
    """
    if Path(named).exists():
        return Found(named)
    what, shape = _read(Path(named).name)
    found = {}
    for folder in Path(named).parent.glob("*__bsz=*"):
        there, then = _read(folder.name)
        if shape and then and there == what and shape.goes_on(then) and (wrote := _wrote(folder)):
            found[wrote] = folder
    newest_first = [found[wrote] for wrote in sorted(found, reverse=True)]
    busy = []
    for folder in newest_first:
        if not (writer := writer_of(folder)):
            return Found(str(folder), busy)
        busy.append(f"{folder} is being written by {writer}")
    return Found(str([*newest_first, named][0]), busy)


def _read(name: str) -> tuple[Mapping[str, str], Shape | None]:
    """The parts of a name that say what a run computes, and the shape of its steps."""
    parts = {part.partition("=")[0]: part for part in name.split("__")}
    batch = re.fullmatch(r"bsz=(\d+)x(\d+)x(\d+)", parts.pop("bsz", ""))
    spread = {key: parts.pop(key, "") for key in SPREAD}
    total = re.fullmatch(r"global_batch_size=(\d+)", spread["global_batch_size"])
    return parts, batch and Shape(*map(int, batch.groups()), int(total[1]) if total else 0)


def _wrote(folder: Path) -> float:
    """When a run wrote its newest state; 0 where it has none, or has finished, or cannot be looked at."""
    with suppress(OSError):  # a run that is going on has removed an older one; another user's may be closed
        if (folder / "state" / "finished.json").exists():
            return 0
        return max((state.stat().st_mtime for state in (folder / "state").glob("epoch*_step*")), default=0)
    return 0
