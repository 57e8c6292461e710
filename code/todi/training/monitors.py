"""Who is told how a run goes: metrics.jsonl always, and the trackers that --report-to names.

A tracker of one's own, in a file that --plugins names:

    @MONITORS.register("mine")
    class Mine:
        def __init__(self, run: RunInfo): ...
        def log(self, kind, step, values): print(kind, step, values)
        def close(self): ...

What a run writes to metrics.jsonl it cannot do without; a tracker it can: one that fails is named in a warning and left
out from there on. Trackers belong to the first rank; the others have `Monitors()`.

W&B: `WANDB_PROJECT` names the project ("todi" when it is not set); `WANDB_MODE=offline` keeps everything in wandb/ of
the run's folder, and `wandb sync RUN/wandb/offline-run-*` uploads it later, a resumed run's parts in their order. The
upload that is left at the end is given `WANDB_FINISH_TIMEOUT` seconds, 60 when it is not set.
trackio: keeps to this machine unless `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` is set; the project is
`TRACKIO_PROJECT`, or "todi".

Tried with tensorboard 2.21.0, wandb 0.31.0 (it must be 0.27 or later) and trackio 0.43.0.
"""

import dataclasses
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from todi.errors import InputError, RunError
from todi.registry import Registry
from todi.runtime.storage import write_text, writing

logger = logging.getLogger(__name__)

PROJECT = "todi"


class Monitor(Protocol):
    """Whoever is told how a run goes."""

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Takes one report.

        Args:
            kind: "train", "dev" or "skipped" (a step left out because its numbers were not finite).
            step: optimizer steps done.
            values: by name; numbers, and also None, words and lists. `scalars` picks the numbers.
        """

    def close(self) -> None:
        """Ends; what is buffered is written."""


@runtime_checkable
class StepMonitor(Monitor, Protocol):
    """A monitor that is told of each step besides, also of those that no line of the log is due for."""

    def step_done(self, step: int) -> None:
        """Takes the number of optimizer steps done."""


@dataclass(frozen=True)
class RunInfo:
    """The run that a tracker is told of.

    Attributes:
        folder: of the run; a tracker may keep its own files there.
        name: how the run is called.
        settings: by name, as in args.json.
        step: where the run starts: 0, or the step of the state that it goes on from. What was reported after that step
            is done again.
        total_steps: where it will end.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    step: int = 0
    total_steps: int = 0


# A factory that needs a package of its own names it in an attribute `package`, so that its lack is found early.
MONITORS: Registry[Callable[[RunInfo], Monitor]] = Registry("monitor")


def scalars(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among `values`, by the names that trackers show: "train/loss"."""
    return {f"{kind}/{name}": value for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)}


def check_monitors(names: Sequence[str]) -> None:
    """Whether there are monitors of these names, and the packages that they need. Imports none of them.

    Raises:
        InputError: lists every name that is unknown and every package that is missing.
    """
    problems = []
    for name in names:
        try:
            package = getattr(MONITORS[name], "package", None)
        except ValueError as error:
            problems.append(f"--report-to: {error}")
        else:
            if package and not _is_installed(package):
                problems.append(f"--report-to {name} needs the package {package}, which is not installed: "
                                f"pip install {package}")
    if problems:
        raise InputError(problems)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a mere folder wandb/ where the run was started has no origin


class JsonLines:
    """metrics.jsonl: one JSON object a line, appended.

    Raises:
        StorageError: here and in `log`, when `path` cannot be written.
    """

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            self._file = path.open("a", encoding="utf-8")

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return os.fstat(self._file.fileno()).st_size

    def cut(self, length: int) -> None:
        """Forgets the lines beyond the first `length` bytes, which are about to be written again."""
        with writing(self._path):
            self._file.truncate(length)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line at once, so that a run can be watched."""
        with writing(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with writing(self._path):
            self._file.close()


class Monitors:
    """Tells all of them. A `RunError` of one ends the run; for anything else that goes wrong, that one is left out.

    Args:
        monitors: by name; none on all ranks but the first.
        trackers: names of those that `start` adds.
        run: what they are told of.
    """

    def __init__(self, monitors: Mapping[str, Monitor] | None = None, trackers: Sequence[str] = (),
                 run: RunInfo | None = None):
        self._monitors = dict(monitors or {})
        self._trackers = trackers
        self._run = run

    def start(self, step: int) -> None:
        """Adds the trackers, now that it is known from which step the run goes on."""
        for name in self._trackers:
            with self._left_out_if_it_fails(name):
                self._monitors[name] = MONITORS[name](dataclasses.replace(self._run, step=step))

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """See `Monitor.log`."""
        for name, monitor in list(self._monitors.items()):
            with self._left_out_if_it_fails(name):
                monitor.log(kind, step, values)

    def step_done(self, step: int) -> None:
        """See `StepMonitor.step_done`."""
        for name, monitor in list(self._monitors.items()):
            if isinstance(monitor, StepMonitor):
                with self._left_out_if_it_fails(name):
                    monitor.step_done(step)

    def close(self) -> None:
        """Closes all of them, the last one first; to be called however the run ends."""
        for name, monitor in reversed(list(self._monitors.items())):
            with self._left_out_if_it_fails(name):
                monitor.close()
        self._monitors.clear()

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except RunError:
            raise
        except Exception as error:  # whatever a network or a tracker's library raises: no reason to stop training
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            logger.warning("monitor %s failed and is left out from here on: %s: %s", name, type(error).__name__, reason)
            self._monitors.pop(name, None)


@MONITORS.register("tensorboard")
class TensorBoard:
    """Event files in tensorboard/ of the run's folder: `tensorboard --logdir outputs`."""

    package: ClassVar[str] = "tensorboard"

    def __init__(self, run: RunInfo):
        from torch.utils.tensorboard import SummaryWriter

        # hides what an earlier process wrote at this step or later
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)
        settings = json.dumps(dict(run.settings), indent=2, default=str)
        self._writer.add_text("settings", f"```json\n{settings}\n```", run.step)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """A point in the curve of each number, to be seen at once."""
        for name, value in scalars(kind, values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


@MONITORS.register("wandb")
class WeightsAndBiases:
    """A run of W&B; the same one after a resume, whose id is kept in wandb_id.txt of the run's folder.

    Curves are drawn over a value "step" of our own: of W&B's step it drops what is not beyond the last one, and so
    the dev score of a run that was stopped between a step and its evaluation.
    """

    package: ClassVar[str] = "wandb"

    def __init__(self, run: RunInfo):
        import wandb

        kept = run.folder / "wandb_id.txt"
        earlier = kept.read_text(encoding="utf-8").strip() if run.step and kept.is_file() else None
        # nobody may be there to answer a prompt, and a dead network would be waited for without end
        wandb.setup(wandb.Settings(login_timeout=60))
        patience = wandb.Settings(finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", 60)))
        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), dir=str(run.folder), name=run.name,
                               config=dict(run.settings), id=earlier, resume="allow" if earlier else None,
                               reinit="create_new", settings=patience)
        self._run.define_metric("*", step_metric="step")
        write_text(kept, f"{self._run.id}\n")

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds a row of the numbers."""
        if numbers := scalars(kind, values):
            self._run.log({"step": step} | numbers)

    def close(self) -> None:
        """Uploads what is left, for as long as WANDB_FINISH_TIMEOUT allows."""
        self._run.finish()


@MONITORS.register("trackio")
class Trackio:
    """A run of trackio; after a resume the latest one of the same name. `trackio show --project todi` shows it."""

    package: ClassVar[str] = "trackio"

    def __init__(self, run: RunInfo):
        import trackio

        self._trackio = trackio
        self._run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=run.name,
                                 config=dict(run.settings), resume="allow" if run.step else "never")

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds the numbers at this step."""
        if numbers := scalars(kind, values):
            self._run.log(numbers, step=step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._trackio.finish()  # and not the run's own, which would be called once more at exit
