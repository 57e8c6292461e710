"""Trains the same thing in all ways that must not change it, and says how far they are apart.

    python benchmarks/invariance.py
    python benchmarks/invariance.py --only nodes "spread teacher"

It needs pytest's side of the project (`bash scripts/test.sh` installs that). Each row is a run of a launcher on tiny
models in fp32 without dropout, ToDi with cross-entropy, two epochs of steps of 8, 8 and 2 samples, beside that of one
process, padded, with the teacher itself, under ZeRO 1; LoRA, and a student that writes, have such a run of their own.
Prints a table for benchmarks/README.md; exit code 1 when something is further apart than `--limit`.

The rows are each thing alone, and together what has to do with one another:

- offload with several micro-batches, whose gradients are added up in the computer's memory; over ranks and packed too,
  where ranks have other shares;
- four ranks, of which two have nothing in the last step of an epoch, and take part in it all the same;
- packing, by which a rank has other samples than padded, and a step as many micro-batches as it takes;
- a cache that other ranks, or a spread teacher, have filled; a spread teacher beside a student under ZeRO 3, which
  both gather weights at their own times;
- a state of other ranks, stages and places of the optimizer, taken up within an epoch; after a signal, after SIGKILL,
  twice; within a round of what the student has written; with LoRA, which has weights that no optimizer knows;
- nodes with one and two ranks, where a rank's number is not that on its node.

All but the base have DeepSpeed buckets that hold a part of the model only, and under ZeRO 3 norms and biases stay whole
and matrices are spread: as it is with models that are not tiny.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from differences import Differences, differences
from killing import killer
from launching import Workshop, run, run_on_nodes
from stopping import KD, steady, stopper

# Settings of a run, and what its log says of them.
FEATURES = {
    "packed": ({"PACKING": "auto"}, "micro-batches are packed"),
    "cache": ({"TEACHER_CACHE": "{folder}/cache"}, "its weights are not in memory"),
    "spread teacher": ({"TEACHER_ZERO": "on"}, "a layer at a time is gathered"),
    "LoRA": ({"PEFT": "lora", "LORA_ALPHA": 8, "LORA_DROPOUT": 0}, "LoRA on "),
    "writing": ({"SAMPLES": "student", "KD_RATE": 1, "ROUND_STEPS": 3, "SAMPLE_TOKENS": 12},
                "the student has written"),
}
OWN_BASE = {"LoRA", "writing"}  # they change what is computed
BUCKETS = {"zero_optimization": {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000,
                                 "stage3_prefetch_bucket_size": 5000, "stage3_param_persistence_threshold": 1000}}
SAMPLES = 8  # of a step
BOTH = "optimizer param"


@dataclass(frozen=True)
class World:
    """The processes that a run is started with, and what each holds.

    Attributes:
        ranks: of each node.
        stage: of ZeRO.
        batch: samples of a micro-batch at most.
        offload: what lies in the computer's memory.
    """

    ranks: int = 1
    stage: int = 1
    batch: int = SAMPLES
    offload: str = ""
    nodes: int = 1

    def __str__(self):
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        offload = f", offload {self.offload}" if self.offload else ""
        return f"{nodes}{self.ranks} rank{'s' * (self.ranks > 1)} by {self.batch}, ZeRO {self.stage}{offload}"

    @property
    def settings(self) -> dict[str, object]:
        """Of the launcher on each node."""
        return {"NPROC": self.ranks, "BATCH_SIZE": self.batch, "ZERO_STAGE": self.stage, "OFFLOAD": self.offload}


@dataclass(frozen=True)
class Row:
    """A run that must be as its base.

    Attributes:
        worlds: it is broken off in each but the last, and goes on in the next.
        features: of `FEATURES`.
        killed: whether SIGKILL breaks it off, not SIGTERM.
    """

    worlds: Sequence[World]
    features: Sequence[str] = ()
    killed: bool = False

    @property
    def name(self) -> str:
        """What it is, in words."""
        worlds = (", killed, then " if self.killed else ", then ").join(map(str, self.worlds))
        return "; ".join([worlds, *self.features])

    @property
    def is_base(self) -> bool:
        """Whether it is what others are compared with."""
        return tuple(self.worlds) == (World(),) and OWN_BASE.issuperset(self.features)

    @property
    def base(self) -> "Row":
        """What it is compared with."""
        return Row([World()], [feature for feature in self.features if feature in OWN_BASE])

    def settings(self, folder: Path) -> dict[str, object]:
        """Of all its worlds; writes the files that they name into `folder`."""
        found = {"PACKING": "off", "GLOBAL_BATCH_SIZE": SAMPLES, "SAVE_DIR": folder / "run"}
        for feature in self.features:
            found |= {name: str(value).format(folder=folder) for name, value in FEATURES[feature][0].items()}
        if not self.is_base:
            (folder / "buckets.json").write_text(json.dumps(BUCKETS))
            found["DEEPSPEED_CONFIG"] = folder / "buckets.json"
        if self.killed:  # in step 5, with a state of step 4
            last = self.worlds[0].nodes * self.worlds[0].ranks - 1
            found |= {"PLUGINS": killer(folder / "killer.py", "step", last), "SAVE_STATE_EVERY": 2}
        elif len(self.worlds) > 1:
            found["PLUGINS"] = stopper(folder / "stopper.py", *(2, 4)[1 - len(self.worlds):])
        return found

    def run(self, folder: Path, settings: Mapping[str, object]) -> Path:
        """Runs it to its end; the folder that it has written. Raises RunFailed where it does something else."""
        folder.mkdir()
        settings, said = {**settings, **self.settings(folder)}, ""
        for number, world in enumerate(self.worlds, start=1):
            done = run_on_nodes(KD, settings | world.settings, *[{}] * world.nodes) if world.nodes > 1 else \
                [run(KD, **settings | world.settings)]
            output = "".join(one.stdout for one in done)
            said += output
            if any((one.returncode == 0) != (number == len(self.worlds)) for one in done):
                raise RunFailed(f"{world} ended with {', '.join(str(one.returncode) for one in done)}", output)
        missing = [words for words in self.must_say() if words not in said]
        if missing:
            raise RunFailed(f"nothing says {missing[0]!r}", said)
        return folder / "run"

    def must_say(self) -> list[str]:
        """What the log has, if the run is what the row says."""
        changes = [f"the state of {_spread(before)} goes on with {_spread(after)}"
                   for before, after in pairwise(self.worlds)]
        return [*(FEATURES[feature][1] for feature in self.features), *changes]


class RunFailed(Exception):
    """A run that did not do what it was to; why, and what it said."""


def _spread(world: World) -> str:
    ranks = world.nodes * world.ranks
    return f"{ranks} rank{'s' * (ranks > 1)} at ZeRO stage {world.stage}"


ROWS = (
    # one process
    *(Row([World(batch=batch)]) for batch in (3, 1)),
    *(Row([World(stage=stage, batch=2)]) for stage in (0, 2, 3)),
    *(Row([World(stage=stage, batch=2, offload="optimizer")]) for stage in (1, 2, 3)),
    *(Row([World(stage=3, batch=batch, offload=BOTH)]) for batch in (8, 2)),
    *(Row([World(batch=batch)], ["packed"]) for batch in (8, 2)),
    Row([World()], ["cache"]),
    # several
    *(Row([World(2, stage, 2)]) for stage in range(4)),
    *(Row([World(4, stage, 2)]) for stage in (1, 3)),
    Row([World(2, 1, 2, "optimizer")]),
    Row([World(2, 2, 2, "optimizer")], ["packed"]),
    Row([World(2, 3, 2, BOTH)]),
    Row([World(4, 3, 2, BOTH)], ["packed"]),
    Row([World(2, 1, 4)], ["packed"]),
    Row([World(2, 3, 1)], ["packed"]),
    # who teaches
    Row([World(2, 3, 2, BOTH)], ["packed", "cache"]),
    Row([World(2, 1, 2)], ["spread teacher"]),
    Row([World(2, 3, 4)], ["packed", "spread teacher"]),
    Row([World(4, 2, 2)], ["cache", "spread teacher"]),
    # the world changes
    Row([World(2, 3, 4), World(1, 1, 8)]),
    Row([World(1, 0, 4), World(4, 2, 2)]),
    Row([World(2, 1, 4), World(2, 3, 4, BOTH)], ["packed"]),
    Row([World(4, 3, 2, BOTH), World(2, 1, 4)]),
    Row([World(2, 3, 2), World(4, 3, 2)], ["packed"], killed=True),
    Row([World(1, 2, 4, "optimizer"), World(2, 3, 4)], ["cache"]),
    Row([World(1, 1, 8), World(4, 3, 1, BOTH), World(2, 2, 2)]),
    # nodes
    Row([World(1, 1, 4, nodes=2)]),
    Row([World(1, 3, 4, nodes=2)], ["packed"]),
    Row([World(2, 1, 2, nodes=2)], ["packed"]),
    Row([World(2, 3, 2, BOTH, nodes=2)]),
    Row([World(1, 3, 4, nodes=2)], ["cache", "spread teacher"]),
    Row([World(2, 3, 2, nodes=2), World(1, 1, 8)]),
    # LoRA
    Row([World(1, 3, 2, BOTH)], ["LoRA"]),
    Row([World(2, 2, 4)], ["packed", "LoRA"]),
    Row([World(4, 3, 2)], ["LoRA"]),
    Row([World(2, 0, 2)], ["cache", "LoRA"]),
    Row([World(2, 3, 2, BOTH), World(1, 0, 8)], ["LoRA"]),
    Row([World(1, 3, 4, nodes=2)], ["LoRA"]),
    # what the student writes
    Row([World(2, 1, 4)], ["writing"]),
    Row([World(4, 3, 2)], ["writing"]),
    Row([World(2, 3, 2, BOTH)], ["packed", "spread teacher", "writing"]),
    Row([World(2, 3, 4), World(1, 1, 8)], ["packed", "writing"]),
)


def measure(rows: Sequence[Row], folder: Path, limit: float) -> int:
    """Prints a line of the table for each row; how many are not as they should be."""
    settings, bases, wrong = steady(Workshop(folder / "workshop")), {}, 0
    for number, row in enumerate(rows):
        try:
            base = base_of(row, bases, folder, settings)
            found = differences(row.run(folder / str(number), settings), base)
        except (RunFailed, ValueError) as error:
            print(f"| {row.name} | FAILED: {error.args[0]} | | | |", flush=True)
            print(*error.args[1:], file=sys.stderr)
            wrong += 1
        else:
            print(line(row, found, limit), flush=True)
            wrong += not found.are_within(limit)
    return wrong


def base_of(row: Row, bases: dict[str, Path | None], folder: Path, settings: Mapping[str, object]) -> Path:
    """The folder of a row's base, which runs once; `bases` has those that have run, and None for one that failed.

    Raises:
        RunFailed: it failed, now or for an earlier row.
    """
    base = row.base
    if base.name not in bases:
        bases[base.name] = None
        try:
            bases[base.name] = base.run(folder / f"base {len(bases)}", settings)
        except RunFailed as error:
            raise RunFailed(f"its base: {error.args[0]}", *error.args[1:]) from None
    if (found := bases[base.name]) is None:
        raise RunFailed("its base has failed, see above")
    return found


def line(row: Row, found: Differences, limit: float) -> str:
    """Of the table."""
    cells = ("0" if one == 0 else f"{one:.0e}" if one <= limit else f"**{one:.1e}**"
             for one in (found.loss, found.norm, found.dev, found.weights))
    return f"| {row.name} | {' | '.join(cells)} |"


def main() -> None:
    """Parse, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="WORDS", default=[""],
                        help="the rows that have one of these in their names")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--limit", type=float, default=1e-5, help="how far apart they may be, relatively")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if any(words in row.name for words in arguments.only)]
    if arguments.list or not rows:
        print(*(row.name for row in rows or ROWS), sep="\n")
        sys.exit(0 if rows else f"no row has {' or '.join(arguments.only)} in its name; the names are above")
    print("| run | loss | gradient norm | loss on dev | weights |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        wrong = measure(rows, Path(name), arguments.limit)
    print(f"\n{len(rows)} rows, {wrong} of them not as they should be")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
