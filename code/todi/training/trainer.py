"""The training loop: a step after the other; at the end of an epoch, dev, the checkpoint and the state."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from todi.data.plans import StepPlan
from todi.data.sample_sources import SampleSource
from todi.errors import RunError
from todi.runtime.cadence import Cadence
from todi.runtime.distributed import World
from todi.runtime.logs import peak_memory_gib
from todi.runtime.progress import Progress
from todi.runtime.signals import Interrupted, StopSignals
from todi.runtime.whereabouts import at
from todi.training.dev import Judge
from todi.training.monitors import Monitors
from todi.training.optimizer import lowers_loss_scale
from todi.training.run_folder import RunFolder
from todi.training.scores import Score
from todi.training.speed import Meter, in_words
from todi.training.state import Position
from todi.training.step import StepResult, Sums, TrainStep, add, means

logger = logging.getLogger(__name__)


class TrainingError(RunError):
    """Training cannot go on; the message says why and what was kept."""


@dataclass(frozen=True)
class Pace:
    """How long to train, and what happens how often.

    Attributes:
        max_steps: optimizer steps in all.
        log_interval: optimizer steps between lines of the log.
        eval_interval: epochs between evaluations; there is one after the last epoch besides.
        max_bad_steps: so many steps in a row with numbers that are not finite end the run.
        cadence: when a resume state is due within an epoch; there is one at the end of each besides.
    """

    max_steps: int
    log_interval: int = 10
    eval_interval: int = 1
    max_bad_steps: int = 10
    cadence: Cadence = Cadence("0")


class Trainer:
    """Trains until `pace` says so. Making one touches no file and no signal; every rank has one.

    Args:
        step: does an optimizer step.
        source: of the samples of each step.
        judge: says how good the student is.
        export: writes the student that has this score into a folder.
        folder: where checkpoints, states and metrics go.
        monitors: to whom metrics are told.
        meter: says how fast it goes.
    """

    def __init__(self, step: TrainStep, source: SampleSource, judge: Judge, export: Callable[[Score, Path], None],
                 folder: RunFolder, monitors: Monitors, pace: Pace, world: World, meter: Meter | None = None):
        self.step = step
        self.source = source
        self.judge = judge
        self.export = export
        self.folder = folder
        self.monitors = monitors
        self.pace = pace
        self.world = world
        self.meter = meter or Meter()
        self.at = Position()
        self.window: Sums = {}  # this rank's sums over the steps since the last line of the log
        self.bad_steps = 0  # in a row

    def train(self) -> None:
        """Runs every epoch that is left, evaluating and saving as it goes.

        Raises:
            Interrupted: a signal asked to stop; the state has been saved.
            TrainingError: too many steps in a row were not finite.
            StorageError: a checkpoint or a state cannot be written.
        """
        with StopSignals() as self.signals:
            self._take_up_state()
            self.monitors.start(self.at.step)
            self.progress = Progress(self.pace.max_steps, self.at.step, self.at.seconds)
            last_epoch = -(-self.pace.max_steps // self.source.steps_per_epoch)
            for epoch in range(self.at.epochs + 1, last_epoch + 1):
                self.step.engine.train()
                with at(f"epoch {epoch}, between two steps"):
                    self._train_epoch(epoch)
                if epoch % self.pace.eval_interval == 0 or epoch == last_epoch:
                    self._evaluate_and_save_unless_asked_to_stop(epoch)
                self.at.epochs = epoch
                if epoch < last_epoch:
                    self._save_state()
                    self._stop_if_asked()
            self.folder.finish(self._position())

    def _take_up_state(self) -> None:
        """Takes up the newest state, if there is one; what came after it is done again."""
        state = self.folder.load_state(self.step.engine)
        if state:
            self.at, self.window = state.position, state.window
            self.source.load_state_dict(state.source)
            if self.step.schedule:
                self.step.schedule.load_state_dict(state.schedule)
        self.folder.start_over_from(self.at)

    def _train_epoch(self, epoch: int) -> None:
        done = self.at.step - (epoch - 1) * self.source.steps_per_epoch
        for plan, following in _with_following(self.meter.each("data", self.source.steps(epoch, first_step=done))):
            if self.at.step == self.pace.max_steps:
                break
            if following:
                self.step.expect(following)
            self.at.step += 1
            logs = self.at.step == self.pace.max_steps or self.at.step % self.pace.log_interval == 0
            lr = self.step.lr  # the schedule moves on within the step
            # sent before the step and read after it, so that no rank waits for another on its account
            wishes = self.world.largest_later(self._wishes, self.step.engine.device)
            with at(f"step {self.at.step}"), self.meter.step():
                result = self.step(plan, with_diagnostics=logs)
            self.window = add(self.window, result.sums)
            if result.finite is None:
                self.bad_steps = 0
            else:
                self._note_bad_step(plan, result.finite)
            self.progress.samples += plan.samples
            self.monitors.step_done(self.at.step)
            if logs:
                self._log_train(epoch, means(self.window, self.world), lr, result)
                self.window = {}
            self._heed_signals_and_clock(*wishes())

    def _note_bad_step(self, plan: StepPlan, finite: Sequence[bool]) -> None:
        """DeepSpeed left out a step whose gradients were not finite: says which samples it was made of."""
        micro_batches = [[example.sample_id for example in part] for part in plan.micro_batches]
        bad = [ids for ids, is_finite in zip(micro_batches, finite, strict=True) if not is_finite]
        everywhere = [ids for part in self.world.gather(bad) for ids in part]
        if lowers_loss_scale(self.step.engine) and not everywhere:
            return  # the loss scale was too high and is lowered: part of training in fp16
        self.at.skipped += 1
        self.bad_steps += 1
        suspects = everywhere or [ids for part in self.world.gather(micro_batches) for ids in part]
        samples = sorted(i for ids in suspects for i in ids)
        what = "loss" if everywhere else "gradient"
        logger.warning("step %d skipped: its %s is not finite (%d skipped so far); training records %s",
                       self.at.step, what, self.at.skipped, samples)
        self.monitors.log("skipped", self.at.step, {"what": what, "samples": samples})
        if self.bad_steps >= self.pace.max_bad_steps:
            raise TrainingError(f"{self.bad_steps} steps in a row were not finite; the states and checkpoints before "
                                "them are kept. Go on with a lower learning rate (--lr, with --resume force), or look "
                                "at the records named above")

    def _wishes(self) -> list[float]:
        """The signal that asks this rank to stop, or 0, and whether a state is due after this step."""
        return [self.signals.received, self.pace.cadence.is_due(self.at.step)]

    def _heed_signals_and_clock(self, signal: float, due: float) -> None:
        """Saves the state when it is due or when a signal asks to stop: all ranks at the same step. Of several ranks it
        is the first step that began after the signal came."""
        if signal or due:
            self._save_state()
        if signal:
            raise Interrupted(int(signal))

    def _stop_if_asked(self) -> None:
        """Heeds a signal that came during an evaluation; the state has just been saved."""
        signal, = self.world.largest([self.signals.received], self.step.engine.device)
        if signal:
            raise Interrupted(signal)

    def _save_state(self) -> None:
        with at("a save"), self.progress.paused():
            schedule = self.step.schedule.state_dict() if self.step.schedule else {}
            seconds = self.folder.save_state(self.step.engine, self._position(), self.window,
                                             self.source.state_dict(), schedule)
            self.pace.cadence.written(seconds)

    def _position(self) -> Position:
        self.at.seconds = self.progress.seconds()
        return self.at

    def _log_train(self, epoch: int, mean: Mapping[str, float], lr: float, last: StepResult) -> None:
        engine, losses = self.step.engine, {name: value for name, value in mean.items() if name != "correct"}
        norm = engine.get_global_grad_norm()
        peak, = self.world.largest([peak_memory_gib(engine.device)], engine.device)
        speed = self.meter.report(self.progress.lap())
        values = {**losses, "accuracy": mean["correct"], "lr": lr,
                  "gradient_norm": float(norm) if norm is not None and math.isfinite(norm) else None,
                  "samples_per_second": self.progress.samples_per_second(),
                  **speed, "peak_memory_gib": peak,
                  **{f"kd_{name}": value for name, value in last.moved.items()}, **last.diagnostics}
        self._tell("train", epoch, {"seconds": self.progress.seconds(), **values})
        logger.info("epoch %d step %d/%d %s acc %.3f lr %.2e | %.1f samples/s, %s%.1f GiB, %s left",
                    epoch, self.at.step, self.pace.max_steps,
                    " ".join(f"{name} {value:.4f}" for name, value in losses.items()), mean["correct"], lr,
                    values["samples_per_second"], in_words(speed), values["peak_memory_gib"],
                    self.progress.left(self.at.step))

    def _evaluate_and_save_unless_asked_to_stop(self, epoch: int) -> None:
        """Raises Interrupted where a signal has asked to stop meanwhile: the run goes on with this evaluation."""
        try:
            with at("the evaluation on dev"), self.progress.paused():
                self._evaluate_and_save(epoch)
        except Interrupted:
            self._save_state()
            raise

    def _evaluate_and_save(self, epoch: int) -> None:
        self.step.engine.eval()
        started = time.perf_counter()
        score = self.judge(self.step.engine, lambda: self.signals.received)
        seconds = time.perf_counter() - started
        self._tell("dev", epoch, {"loss": score.loss, "accuracy": score.accuracy, "rouge_l": score.rouge_l,
                                  "seconds": seconds})
        rouge = "" if score.rouge_l is None else f" rouge-l {score.rouge_l:.2f}"
        logger.info("dev after epoch %d: loss %.4f acc %.3f%s (%.0f s)",
                    epoch, score.loss, score.accuracy, rouge, seconds)
        with at("the save of a checkpoint"):
            self.folder.checkpoints.offer(score, epoch, self.at.step, partial(self.export, score))

    def _tell(self, kind: str, epoch: int, values: Mapping[str, Any]) -> None:
        """Tells the monitors, and the source of samples, which may adapt to it."""
        self.monitors.log(kind, self.at.step, {"epoch": epoch, **values})
        self.source.observe({f"{kind}/{name}": value for name, value in values.items() if value is not None})


def _with_following(plans: Iterator[StepPlan]) -> Iterator[tuple[StepPlan, StepPlan | None]]:
    """Each plan with the one after it, where that can be made already."""
    plan = next(plans, None)
    while plan is not None:
        following = None if plan.closes_round else next(plans, None)
        yield plan, following
        plan = next(plans, None) if plan.closes_round else following
