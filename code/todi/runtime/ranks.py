"""Starts the ranks of this node under torchrun's agent, and has the last word when they end: what ended them.

    python -m todi.runtime.ranks --standalone --nproc-per-node 2 -m todi.train ...

takes torchrun's options. The agent's own page on a failure, which names exit codes only, is left out. Each rank says in
a file where it stands (runtime/whereabouts.py); a rank that is killed by SIGKILL has said it before.
"""

import logging
import os
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from todi.errors import RunError, run_main
from todi.runtime.endings import Ending, cause_of, lost_line
from todi.runtime.hangs import timeout_from_environment
from todi.runtime.nursing import Nurse
from todi.runtime.parent import PARENT, parent_from_environment
from todi.runtime.whereabouts import RANKS_FOLDER, Record, read_record, record_path


def main() -> None:
    """Parse, start, wait, say how it ended."""
    arguments = parse_args(sys.argv[1:])
    logging.disable(logging.ERROR)  # the agent's own words
    with tempfile.TemporaryDirectory(prefix="todi_ranks_") as name:
        folder = Path(name)
        arguments.log_dir = str(folder / "agent")  # it would leave one behind
        nurse = Nurse(folder, timeout_from_environment(), parent_from_environment())
        os.environ |= {RANKS_FOLDER: str(folder), PARENT: str(os.getpid())}  # the ranks inherit it
        with nurse:
            try:
                run(arguments)
            except ChildFailedError as error:
                _say_and_exit([_ending(folder, rank, failure.pid, failure.exitcode)
                               for rank, failure in error.failures.items()], nurse.final_verdict())
            except SignalException as error:
                sys.exit(128 + error.sigval)
            except Exception as error:
                raise RunError(f"the processes cannot be started, or kept together: {error}") from None


def _ending(folder: Path, rank: int, pid: int, exit_code: int) -> Ending:
    return Ending(rank, pid, exit_code, read_record(record_path(folder, rank)) or Record(pid))


def _say_and_exit(endings: list[Ending], verdict: str) -> None:
    """Prints the cause as the last line, writes it into the log of the run, and exits with what it exited with.

    Args:
        endings: those of the ranks that failed, in the order in which they did.
        verdict: why they were ended, where the nurse did it.
    """
    cause = cause_of(endings)
    if verdict:
        _say(f"error: {verdict}", endings)
        sys.exit(1)
    if cause.is_consequence:
        _say(lost_line(endings), endings)
    elif not cause.was_asked_for:
        _say(f"error: {cause.in_words(socket.gethostname())}", endings)
    sys.exit(cause.shell_code)


def _say(line: str, endings: list[Ending]) -> None:
    print(line, file=sys.stderr, flush=True)
    for log in {ending.record.log for ending in endings} - {""}:
        with suppress(OSError), open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")


if __name__ == "__main__":
    run_main(main)
