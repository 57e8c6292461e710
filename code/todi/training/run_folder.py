"""The folder of a run: who writes to it, and what lies in it."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import deepspeed

from todi.errors import InputError, collecting
from todi.runtime.distributed import World
from todi.runtime.heartbeat import clear_heartbeats, heartbeat_in
from todi.runtime.locks import claimed
from todi.runtime.logs import log_file
from todi.runtime.storage import discard, write_text
from todi.training.checkpoints import BestCheckpoints
from todi.training.monitors import JsonLines
from todi.training.state import Position, SavedState, StateStore
from todi.training.step import Sums

logger = logging.getLogger(__name__)


class RunFolder:
    """args.json, train.log, metrics.jsonl, heartbeat/, state/ and the checkpoints of one run.

    Making one touches no file.

    Every rank has one, and calls its methods in step with the others.

    Args:
        keep_best: so many checkpoints.

    Attributes:
        metrics: metrics.jsonl, of the first rank and while it is claimed; else None.
    """

    def __init__(self, path: Path, world: World, keep_best: int = 1):
        self.path = path
        self.world = world
        self.states = StateStore(path, world)
        self.checkpoints = BestCheckpoints(path, keep_best, writes_files=world.is_main)
        self.metrics: JsonLines | None = None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder, and until the block ends keeps other runs out of it and writes train.log and heartbeat/.

        Raises:
            InputError: another run is writing there.
            StorageError: it cannot be made.
        """
        with ExitStack() as stack:
            self._claim(stack)
            with suppress(OSError):
                self.path.mkdir(exist_ok=True)  # it is there, but NFS may remember that it was not
            if self.path.is_dir():
                stack.enter_context(log_file(self.path / "train.log"))
                stack.enter_context(heartbeat_in(self.path, self.world.rank))
            if self.world.is_main:
                self.metrics = stack.enter_context(closing(JsonLines(self.path / "metrics.jsonl")))
            yield

    def _claim(self, stack: ExitStack) -> None:
        """By the first rank; where it is refused, all of them raise what it heard."""
        problems: list[str] = []
        if self.world.is_main:
            with collecting(problems):
                stack.enter_context(claimed(self.path))
                clear_heartbeats(self.path)
        if problems := self.world.from_main(problems):
            raise InputError(problems)

    def start_run(self, run: Mapping[str, Any], anew: bool) -> bool:
        """Notes what the run is; False when it has finished, so that there is nothing to do.

        Args:
            run: what args.json will hold.
            anew: remove what an earlier run left there.
        """
        if self.world.is_main and anew and self.states.folder.is_dir():
            discard(self.states.folder)
        finished = self.world.from_main(self.states.finished)
        if self.world.is_main and finished is None:
            write_text(self.path / "args.json", json.dumps(run, indent=2) + "\n")
        elif self.world.is_main:  # it may have been killed while it tidied up
            self.states.clear()
            self.checkpoints.kept = finished.best
            self.checkpoints.release()
            logger.info("%s has finished after %d steps; nothing to do (--resume never would start it anew)",
                        self.path, finished.step)
        return finished is None

    @property
    def rounds(self) -> Path:
        """Where a teacher keeps what it has read of the text that the student writes."""
        return self.states.folder / "rounds"

    def load_state(self, engine: deepspeed.DeepSpeedEngine) -> SavedState | None:
        """Puts the newest state, if there is one, back into the engine."""
        path = self.states.newest()
        return self.states.load(path, engine) if path else None

    def start_over_from(self, position: Position) -> None:
        """Forgets what came after `position`, which is about to be done again."""
        self.checkpoints.kept = position.best
        self.checkpoints.release()
        if self.metrics:
            self.metrics.cut(position.metrics_bytes)

    def save_state(self, engine: deepspeed.DeepSpeedEngine, position: Position, window: Sums,
                   source: dict[str, Any], schedule: dict[str, Any]) -> float:
        """Writes a state, and removes the checkpoints that the one before still counted on; returns its seconds.

        Raises:
            StorageError: it cannot be written; the earlier states are untouched.
        """
        seconds = self.states.save(engine, SavedState(self._complete(position), dict(window), source, schedule))
        self.checkpoints.release()
        return seconds

    def finish(self, position: Position) -> None:
        """Marks the run as complete."""
        self.states.finish(self._complete(position))
        self.checkpoints.release()

    def _complete(self, position: Position) -> Position:
        return dataclasses.replace(position, best=self.checkpoints.kept,
                                   metrics_bytes=self.metrics.bytes if self.metrics else 0)
