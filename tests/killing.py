"""A plugin of a run that hits one of its ranks at a place of its work, once."""

from pathlib import Path

# What a rank says of where it stands is a good place to be hit.
_KILLER = """
import os, signal
from pathlib import Path
from todi.runtime.whereabouts import Whereabouts

tick, count = Whereabouts.tick, 0

def tick_or_die(self):
    global count
    tick(self)
    mark = Path({mark!r})
    if (self.record.place.startswith({place!r}) and os.environ.get("RANK", "0") == "{rank}" and not mark.exists()
            and ({when})):
        count += 1
        if count == {ticks}:
            mark.touch()
            {what}

Whereabouts.tick = tick_or_die
"""
# Where, and how often the rank has got on there before: in the second save its files are about to be written.
PLACES = {"step": ("step 5", 1), "generation": ("generation", 3), "save": ("a save", 10),
          "cache pass": ("the cache pass", 2)}


KILLS, STOPS = (f"os.kill(os.getpid(), signal.{name})" for name in ("SIGKILL", "SIGSTOP"))


def killer(file: Path, where: str, rank: int, what: str = KILLS, when: str = "True") -> Path:
    """Writes the plugin: PLUGINS for a training or an evaluation.

    Args:
        where: of `PLACES`.
        rank: which one.
        what: a statement that the rank is made to run.
        when: an expression; before it is true nothing counts.
    """
    place, ticks = PLACES[where]
    file.write_text(_KILLER.format(mark=str(file.with_suffix(".hit")), place=place, ticks=ticks, rank=rank,
                                   what=what, when=when))
    return file
