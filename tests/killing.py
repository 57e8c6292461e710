"""A plugin of a run that has one of its ranks signal itself at a place of its work, once."""

import signal
from pathlib import Path

# What a rank says of where it stands is a good place to be hit.
_KILLER = """
import os, pathlib
from todi.runtime.whereabouts import Whereabouts

tick, count = Whereabouts.tick, 0

def tick_or_die(self):
    global count
    tick(self)
    mark = pathlib.Path({mark!r})
    if self.record.place.startswith({place!r}) and os.environ.get("RANK", "0") == "{rank}" and not mark.exists():
        count += 1
        if count == {ticks}:
            mark.touch()
            os.kill(os.getpid(), {number})

Whereabouts.tick = tick_or_die
"""
# Where, and how often the rank has got on there before: in the second save its files are about to be written.
PLACES = {"step": ("step 5", 1), "generation": ("generation", 3), "save": ("a save", 10),
          "cache pass": ("the cache pass", 2)}


def killer(file: Path, where: str, rank: int, number: int = signal.SIGKILL) -> Path:
    """Writes the plugin: PLUGINS for a training.

    Args:
        where: of `PLACES`.
        rank: which one.
        number: of the signal.
    """
    place, ticks = PLACES[where]
    file.write_text(_KILLER.format(mark=str(file.with_suffix(".hit")), place=place, ticks=ticks, rank=rank,
                                   number=int(number)))
    return file
