"""Breaks training runs off in every way that a rank can end, and looks at how they end and at what they go on with.

    python benchmarks/faults.py
    python benchmarks/faults.py --ranks 2 --stages 1 --where step save --signals SIGKILL

It needs pytest's side of the project (`bash scripts/test.sh` installs that): models, data and launchers are those of
tests/test_resume.py. A rank is hit once, the first and the last one in turn; the same command is then run again to its
end and compared with a run that nothing disturbs. Prints a row for benchmarks/README.md for each; exit code 1 when one
of them takes longer than a minute to end, leaves a process, does not name the rank or goes on to other weights.
"""

import argparse
import hashlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from killing import PLACES, killer
from launching import Workshop
from stopping import Launched, finished, gone_on_with, resumable

_SOON = 60  # seconds
_SAMPLES = 8  # of a step, whatever the number of ranks


@dataclass(frozen=True)
class Case:
    """One way to break a run off: by `signal_name`, sent to `rank` of `ranks` where it is busy with `where`."""

    where: str
    ranks: int
    rank: int
    stage: int
    signal_name: str

    def settings(self, folder: Path) -> dict[str, object]:
        """Of the run, besides those that all have."""
        cache = {"TEACHER_CACHE": folder / "cache"} if self.where == "cache pass" else {}
        return {"NPROC": self.ranks, "BATCH_SIZE": _SAMPLES // self.ranks, "GRAD_ACC": 1, "ZERO_STAGE": self.stage,
                **cache}


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and what became of it.

    Attributes:
        seconds: from the signal to the end of the launcher.
        orphans: processes that are left then.
        checksum, expected: of what the run gave in the end, and what one that nothing disturbed gives.
    """

    seconds: float
    exit_code: int
    last_line: str
    orphans: int
    checksum: str
    expected: str

    def is_right(self, case: Case) -> bool:
        """Whether it is all that is asked for."""
        named = self.last_line.startswith(f"error: rank {case.rank} ") and case.signal_name in self.last_line
        return (named and self.seconds < _SOON and self.exit_code != 0 and not self.orphans
                and self.checksum == self.expected)

    def row(self, case: Case) -> str:
        """In the table."""
        result = "equal" if self.checksum == self.expected else f"DIFFERENT: {self.checksum}, not {self.expected}"
        return (f"| {case.where} | {case.rank} of {case.ranks} | {case.stage} | {case.signal_name} | "
                f"{self.seconds:.1f} | {self.exit_code} | {self.last_line[:100]} | {self.orphans} | {result} |")


def break_off(case: Case, folder: Path, settings: Mapping[str, object], expected: str) -> Outcome:
    """Runs a case in `folder`, then the same run again to its end."""
    folder.mkdir()
    settings = {**settings, **case.settings(folder)}
    plugin = killer(folder / "killer.py", case.where, case.rank, f"os.kill(os.getpid(), signal.{case.signal_name})")
    settings["PLUGINS"] = plugin
    launched = Launched(**settings, SAVE_DIR=folder / "run")
    code, ended = launched.end(), time.time()
    lines, hit = launched.output.rstrip().splitlines() or [""], plugin.with_suffix(".hit")
    if not hit.exists():
        raise SystemExit(f"the run ended before it was hit:\n{launched.output}")
    orphans = len(launched.survivors())
    launched.kill()
    has_state = case.where != "cache pass"
    end = gone_on_with(folder / "run", settings) if has_state else finished(folder / "run", **settings)
    return Outcome(ended - hit.stat().st_mtime, code, lines[-1], orphans, checksum(end), expected)


def checksum(outcome: Mapping[str, object]) -> str:
    """Of what a run gave: weights, metrics, names."""
    return hashlib.sha256(repr(sorted(outcome.items())).encode()).hexdigest()[:12]


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Those that were asked for."""
    for where, ranks, stage, name in product(arguments.where, arguments.ranks, arguments.stages, arguments.signals):
        for rank in (0, ranks - 1):
            yield Case(where, ranks, rank, stage, name)


def main() -> None:
    """Parse, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--where", nargs="+", choices=PLACES, default=list(PLACES), help="what the rank is doing")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(2, 4, 8), default=[2, 4], help="processes of a run")
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=[1, 3], help="of ZeRO")
    parser.add_argument("--signals", nargs="+", choices=[one.name for one in signal.Signals],
                        default=["SIGKILL", "SIGSEGV"], help="what the rank is sent")
    arguments = parser.parse_args()
    print("| in | rank | ZeRO | signal | seconds to the end | exit code | last line | orphans | after going on |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    wrong, whole = 0, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = resumable(Workshop(folder / "workshop"))
        for number, case in enumerate(cases(arguments)):
            kind = case.ranks, case.stage, case.where == "cache pass"
            if kind not in whole:
                of_kind = settings | case.settings(folder)
                whole[kind] = checksum(finished(folder / "-".join(map(str, kind)), **of_kind))
            result = break_off(case, folder / str(number), settings, whole[kind])
            print(result.row(case), flush=True)
            wrong += not result.is_right(case)
    print(f"\n{wrong} of them are not as they should be")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
