"""The resume state: everything that a run needs to go on as if it had never stopped.

A state is the folder state/epoch<E>_step<S>/ of a run: DeepSpeed's own checkpoint (weights, optimizer, schedule),
rank<R>.pt with what only that rank knows, and state.json with the rest. It gets its name when it is complete. The
newest two are kept; a finished run leaves state/finished.json alone.
"""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from todi.criterions import LossSums
from todi.errors import InputError
from todi.runtime.distributed import World
from todi.runtime.storage import (
    discard,
    make_durable,
    publish_durable,
    set_aside,
    sweep,
    unfinished,
    write_text,
    writing,
)
from todi.training.layouts import FOLDER, SavedOptimizer, Spread, pieces_of, take_over
from todi.training.optimizer import OptimizerSettings, go_on_at_the_least_loss_scale
from todi.training.scores import Kept
from todi.training.state_files import StateFiles, nothing_executed

logger = logging.getLogger(__name__)

_KINDS = ("whole", "groups cut", "groups cut", "parameters cut")  # how the optimizer is laid out, by the stage
_STREAMS = 1_000_003  # from one seed of random numbers to that after another step
KEPT_STATES = 2  # the newest, and one more in case its files are damaged


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        epochs: epochs done, their evaluation included.
        seconds: of training.
        metrics_bytes: length of metrics.jsonl.
        skipped: steps that were skipped for numbers that are not finite.
        best: the best checkpoints.
    """

    step: int = 0
    epochs: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    skipped: int = 0
    best: list[Kept] = field(default_factory=list)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Position":
        """From what `dataclasses.asdict` gave and JSON kept."""
        return cls(**fields | {"best": [Kept(*entry) for entry in fields["best"]]})


@dataclass(frozen=True)
class SavedState:
    """What a state holds besides what it puts back into the engine.

    Attributes:
        window: this rank's loss sums since the last line of the log; when another number of ranks wrote them, the first
            has all and the others none.
        source: of the source of samples.
        schedule: of what moves parameters of the objective; empty without one.
    """

    position: Position
    window: dict[str, Tensor]
    source: dict[str, Any]
    schedule: dict[str, Any] = field(default_factory=dict)


class StateStore:
    """Writes and reads the states of the run in `folder`. Every rank calls `save`, `newest`, `load` and `finish`."""

    def __init__(self, folder: Path, world: World):
        self.folder = folder / "state"
        self.world = world

    def save(self, engine: deepspeed.DeepSpeedEngine, state: SavedState) -> float:
        """Writes a state and drops those that are too old; returns the seconds it took.

        Raises:
            StorageError: it cannot be written; the earlier states are untouched.
        """
        started, position = time.perf_counter(), state.position
        path = self.folder / f"epoch{position.epochs}_step{position.step}"
        draft = unfinished(path)
        # in place of DeepSpeed's default; a DeepSpeed file that asks for another writer is refused (deepspeed_keys.py)
        engine.checkpoint_engine = files = StateFiles(draft)
        with writing(path):
            if self.world.is_main:
                self.folder.mkdir(exist_ok=True)  # not its parents: a run whose folder is gone must say so
                draft.mkdir()
            self.world.barrier()
            engine.save_checkpoint(str(draft), tag=FOLDER, save_latest=False, exclude_frozen_parameters=True)
            own = {"random": _random_states(engine.device), "pieces": pieces_of(engine),
                   "window": {name: value.cpu() for name, value in state.window.items()}}
            files.save(own, str(draft / f"rank{self.world.rank}.pt"))
            if self.world.is_main:
                for script in draft.glob("*.py"):  # DeepSpeed's, for who has its files without this code
                    files.note(script)
            sizes = {name: size for part in self.world.gather(files.sizes) for name, size in part.items()}
            if self.world.is_main:
                self._complete(path, state, engine.zero_optimization_stage(), sizes)
        self._drop_old()
        seconds = time.perf_counter() - started
        logger.info("state at step %d: %.1f MB in %.1f s", position.step, sum(sizes.values()) / 1e6, seconds)
        return seconds

    def _complete(self, path: Path, state: SavedState, stage: int, sizes: Mapping[str, int]) -> None:
        """Gives a state its name; by the first rank, when all have written their files.

        Args:
            sizes: bytes of each file, by its path in the state.
        """
        draft = unfinished(path)
        record = {"position": dataclasses.asdict(state.position), "ranks": self.world.size, "stage": stage,
                  "source": state.source, "schedule": state.schedule, "files": dict(sizes)}
        (draft / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for written in {draft / "state.json", *((draft / name).parent for name in sizes)} - {draft}:
            make_durable(written)
        publish_durable(path)

    def _drop_old(self) -> None:
        """Deletes the states that are too old. The new one is there already, so that a run need not end for what goes
        wrong here; what is left lies under a name that is swept."""
        doomed: list[Path] = []
        if self.world.is_main:
            with _noted("set aside"):
                for older in self._newest_first()[KEPT_STATES:]:
                    doomed.append(set_aside(older))
        for older in self.world.from_main(doomed):
            self._remove(older)

    def _remove(self, doomed: Path) -> None:
        """Deletes a state that was set aside; of many files each rank deletes a share, and the first what is left."""
        with suppress(OSError):  # another machine may not see the new name yet, or not have let go of the old one
            for name, _ in self._share(doomed):
                (doomed / name).unlink(missing_ok=True)
        self.world.barrier()
        if self.world.is_main:
            with _noted("delete"):
                shutil.rmtree(doomed)

    def newest(self) -> Path | None:
        """The newest state whose files are all there in full."""
        if self.world.is_main:
            sweep(self.folder)
        there = self.world.from_main(self.world.is_main and self._newest_first())
        return next((path for path in there if self._is_whole(path)), None)

    def load(self, path: Path, engine: deepspeed.DeepSpeedEngine) -> SavedState:
        """Puts weights, moments of the optimizer, the step of the schedule and random numbers back.

        Learning rate, decay, clipping and the like stay as the engine was built with.

        A state of another number of ranks or another ZeRO stage is put into this one's layout. With another number of
        ranks each draws random numbers of its own from here on, by its seed and the step.

        Raises:
            InputError: it is of another layout and of a version that did not note its own, or not all of it is here, or
                it holds what no run writes.
        """
        record = _read(path)
        then = Spread(record["ranks"], record.get("stage", _stage(record["files"])))
        now = Spread(self.world.size, engine.zero_optimization_stage())
        if then.ranks != now.ranks or _KINDS[then.stage] != _KINDS[now.stage]:
            _check_every_rank(path, then)
        engine.checkpoint_engine = StateFiles(path)
        settings = OptimizerSettings(engine)
        with nothing_executed(path):
            own = self._own_files(path, then)
            if self._is_laid_out_alike(then, now, own, engine):
                engine.load_checkpoint(str(path), tag=FOLDER, load_module_strict=False)
            else:
                take_over(SavedOptimizer(path, then), engine)
        if then != now:
            logger.info("the state of %s goes on with %s", then, now)
        go_on_at_the_least_loss_scale(engine)
        for change in settings.put_back():
            logger.info("from here on %s", change)
        position = Position.from_json(record["position"])
        if then.ranks == now.ranks:
            _set_random_states(own[0]["random"], engine.device)
        else:
            logger.warning("%s was written by %d ranks, there are %d now: dropout draws other numbers from here on",
                           path, then.ranks, now.ranks)
            torch.manual_seed(torch.initial_seed() + position.step * _STREAMS)
        logger.info("going on from %s: epoch %d, step %d", path, position.epochs + 1, position.step)
        return SavedState(position, _window(own, engine.device), record.get("source", {}),
                          record.get("schedule", {}))

    def _own_files(self, path: Path, then: Spread) -> list[dict[str, Any]]:
        """What the ranks before knew that this one goes on with: its own, or with another number the first has all."""
        mine = [self.world.rank] if then.ranks == self.world.size else range(then.ranks) if self.world.is_main else ()
        return [torch.load(path / f"rank{rank}.pt", map_location="cpu", weights_only=True) for rank in mine]

    def _is_laid_out_alike(self, then: Spread, now: Spread, own: list[dict[str, Any]],
                           engine: deepspeed.DeepSpeedEngine) -> bool:
        """Whether DeepSpeed's files hold just what the engine has, on every rank, so that it reads them itself."""
        if _KINDS[then.stage] != _KINDS[now.stage] or then.owners != now.owners:
            return False
        ours = pieces_of(engine)
        return all(self.world.gather(all(one.get("pieces", ours) == ours for one in own)))

    @property
    def finished(self) -> Position | None:
        """Where the run ended, if it has."""
        file = self.folder / "finished.json"
        return Position.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def finish(self, position: Position) -> None:
        """Marks the run as complete; its states are of no more use."""
        if self.world.is_main:
            self.folder.mkdir(exist_ok=True)
            write_text(self.folder / "finished.json", json.dumps(dataclasses.asdict(position), indent=2) + "\n")
            self.clear()

    def clear(self) -> None:
        """Drops all states and what belongs to them, and what an interrupted run left; by the main rank alone."""
        for path in [*self._newest_first(), *self.folder.glob("rounds")]:
            discard(path)
        sweep(self.folder)

    def _newest_first(self) -> list[Path]:
        paths = self.folder.glob("epoch*_step*")
        return sorted(paths, key=lambda path: (_read(path)["position"]["step"], _read(path)["position"]["epochs"]),
                      reverse=True)

    def _is_whole(self, path: Path) -> bool:
        """Whether all files are there in full; each rank looks at a share of them."""
        wrong = [name for name, size in self._share(path)
                 if not (path / name).is_file() or (path / name).stat().st_size != size]
        damaged = list(chain(*self.world.gather(wrong)))
        if damaged:
            logger.warning("%s is damaged (%s); going back to the state before it", path, ", ".join(damaged))
        return not damaged

    def _share(self, path: Path) -> list[tuple[str, int]]:
        """Of the files of a state, those that this rank looks after: their names and sizes."""
        return list(_read(path)["files"].items())[self.world.rank::self.world.size]


@contextmanager
def _noted(what: str) -> Iterator[None]:
    """That it could not be done is a line of the log."""
    try:
        yield
    except OSError as error:
        logger.warning("cannot %s an old state: %s", what, error)


def _check_every_rank(path: Path, then: Spread) -> None:
    """Raises InputError where the files of other ranks are not here: on another node's own disk, for one."""
    missing = [rank for rank in range(then.ranks) if not (path / f"rank{rank}.pt").is_file()]
    if missing:
        raise InputError(f"{path} lacks the files of {len(missing)} of {then.ranks} ranks: to go on with other devices "
                         "every node must see all of them; copy them there, or go on as before")


def _stage(files: Iterable[str]) -> int:
    """Of ZeRO, by a state's files: 1 for 1 and 2, which are laid out alike; of versions that did not note it."""
    names = [Path(file).name for file in files]
    if not any(name.endswith("_optim_states.pt") for name in names):
        return 0
    return 3 if any(name.startswith("zero_") and name.endswith("_model_states.pt") for name in names) else 1


def _window(own: Iterable[dict[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """The sums of the ranks that this one goes on for."""
    total: dict[str, Tensor] = {}
    for window in (one["window"] for one in own):
        if isinstance(window, Tensor):  # of version 0.1: the fields of LossSums
            window = dict(zip(LossSums._fields, window, strict=True))
        for name, value in window.items():
            total[name] = total[name] + value if name in total else value
    return {name: value.to(device) for name, value in total.items()}


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _read(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text(encoding="utf-8"))
