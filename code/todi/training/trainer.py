"""The training loop: plan, forward, backward, step; at the end of an epoch, dev, the checkpoint and the state."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import DistillationCriterion, LossSums
from todi.data.batches import collate
from todi.data.plans import SampleSource, StepPlan
from todi.errors import RunError
from todi.runtime.cadence import Cadence
from todi.runtime.distributed import World
from todi.runtime.logs import Metrics, peak_memory_gib
from todi.runtime.progress import Progress
from todi.runtime.signals import Interrupted, StopSignals
from todi.teacher.source import TeacherSource
from todi.training.checkpoints import BestCheckpoints, Score, save_model
from todi.training.dev import DevSet, dev_loss, dev_rouge_l, means
from todi.training.state import Position, StateStore

logger = logging.getLogger(__name__)


class TrainingError(RunError):
    """Training cannot go on; the message says why and what was kept."""


class Trainer:
    """Trains the student inside `engine`; the teacher answers from outside it.

    Args:
        engine: a DeepSpeed engine around a `Student`, with optimizer and schedule.
        source: of the samples of each step.
        teacher: None for SFT.
        folder: where checkpoints and resume states go.
        max_steps: the number of optimizer steps in all.
        cadence: when a resume state is due within an epoch; there is one at the end of each besides.
        max_bad_steps: so many steps in a row with numbers that are not finite end the run.
        card: the README.md of a checkpoint with these metrics.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, *, source: SampleSource, dev: DevSet,
                 criterion: DistillationCriterion, teacher: TeacherSource | None, tokenizer: Tokenizer, world: World,
                 folder: Path, keep_best: int, max_steps: int, log_interval: int, eval_interval: int,
                 cadence: Cadence, max_bad_steps: int, card: Callable[[Mapping[str, float]], str]):
        self.engine = engine
        self.source = source
        self.dev = dev
        self.criterion = criterion
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.world = world
        self.best = BestCheckpoints(folder, keep_best, writes_files=world.is_main)
        self.metrics = Metrics(folder / "metrics.jsonl" if world.is_main else None)
        self.states = StateStore(folder, world)
        self.signals = StopSignals()
        self.max_steps = max_steps
        self.log_interval = log_interval
        self.eval_interval = eval_interval
        self.cadence = cadence
        self.max_bad_steps = max_bad_steps
        self.card = card
        self.bad_steps = 0  # in a row
        self.at = Position()
        self.window = self._no_sums()  # this rank's sums over the steps since the last line of the log

    def train(self) -> None:
        """Runs every epoch that is left, evaluating and saving as it goes.

        Raises:
            Interrupted: a signal asked to stop; the state has been saved.
            TrainingError: too many steps in a row were not finite.
            StorageError: a checkpoint or a state cannot be written.
        """
        self._take_up_state()
        self.progress = Progress(self.max_steps, self.at.step, self.at.seconds)
        last_epoch = -(-self.max_steps // self.source.steps_per_epoch)
        for epoch in range(self.at.epochs + 1, last_epoch + 1):
            self.engine.train()
            self._train_epoch(epoch)
            if epoch % self.eval_interval == 0 or epoch == last_epoch:
                with self.progress.paused():
                    self._evaluate_and_save(epoch)
            self.at.epochs = epoch
            if epoch < last_epoch:
                self._save_state()
                self._stop_if_asked()
        self.states.finish(self._position())
        self.best.release()

    def _take_up_state(self) -> None:
        """Takes up the newest state, if there is one; what came after it is done again."""
        path = self.states.newest()
        if path:
            self.at, window = self.states.load(path, self.engine)
            if window is not None:
                self.window = window.to(self.engine.device)
        self.best.kept = self.at.best
        self.best.release()
        self.metrics.cut(self.at.metrics_bytes)

    def _train_epoch(self, epoch: int) -> None:
        done = self.at.step - (epoch - 1) * self.source.steps_per_epoch
        for plan, following in _with_following(self.source.steps(epoch, first_step=done)):
            if self.at.step == self.max_steps:
                break
            if self.teacher and following:
                self.teacher.expect([example.sample_id for part in following.micro_batches for example in part])
            logs = self.at.step + 1 == self.max_steps or (self.at.step + 1) % self.log_interval == 0
            lr = self.engine.optimizer.param_groups[0]["lr"]  # the schedule moves on within the step
            diagnostics = self._train_step(plan, with_diagnostics=logs)
            self.at.step += 1
            self.progress.samples += plan.samples
            if logs:
                self._log_train(epoch, means(self.world.sum(self.window)), lr, diagnostics)
                self.window = self._no_sums()
            self._heed_signals_and_clock()

    def _train_step(self, plan: StepPlan, with_diagnostics: bool) -> dict[str, float]:
        """One optimizer step; adds this rank's sums to the window and returns diagnostics of a micro-batch."""
        losses, diagnostics = [], {}
        # DeepSpeed averages gradients over ranks; a step's loss is divided by the tokens of all ranks instead.
        scale = self.world.size / plan.tokens
        for examples in plan.micro_batches:
            batch = collate(examples, self.tokenizer.pad_token_id).to(self.engine.device)
            teacher = self.teacher.rows(batch) if self.teacher else None
            sums, report = self.engine(batch, self.criterion, teacher, with_diagnostics and not diagnostics)
            self.engine.backward(sums.loss * scale, scale_wrt_gas=False)
            self.engine.step()
            losses.append(torch.stack(sums).detach())
            diagnostics = diagnostics or report
        if self.engine.was_step_applied():
            self.window += torch.stack(losses).sum(0)
            self.bad_steps = 0
        else:
            self._note_bad_step(plan, torch.stack(losses)[:, 0])
        return diagnostics

    def _note_bad_step(self, plan: StepPlan, losses: Tensor) -> None:
        """DeepSpeed left out a step whose gradients were not finite: says which samples it was made of.

        Args:
            losses: (micro-batches,) of this rank.
        """
        micro_batches = [[example.sample_id for example in part] for part in plan.micro_batches]
        bad = [ids for ids, finite in zip(micro_batches, losses.isfinite().tolist(), strict=True) if not finite]
        everywhere = [ids for part in self.world.gather(bad) for ids in part]
        if self.engine.fp16_enabled() and not everywhere:
            return  # the loss scale was too high and is lowered: part of training in fp16
        self.at.skipped += 1
        self.bad_steps += 1
        suspects = everywhere or [ids for part in self.world.gather(micro_batches) for ids in part]
        samples = sorted(i for ids in suspects for i in ids)
        what = "loss" if everywhere else "gradient"
        logger.warning("step %d skipped: its %s is not finite (%d skipped so far); training records %s",
                       self.at.step + 1, what, self.at.skipped, samples)
        self.metrics.write(kind="skipped", step=self.at.step + 1, what=what, samples=samples)
        if self.bad_steps >= self.max_bad_steps:
            raise TrainingError(f"{self.bad_steps} steps in a row were not finite; the states and checkpoints before "
                                "them are kept. Lower the learning rate, or look at the records named above")

    def _heed_signals_and_clock(self) -> None:
        """Saves the state when it is due or when a signal asks to stop: all ranks at the same step."""
        due = self.cadence.is_due(self.at.step)
        wishes = torch.tensor([self.signals.received, due], device=self.engine.device)
        signal, due = self.world.max(wishes).tolist()
        if signal or due:
            self._save_state()
        if signal:
            raise Interrupted(signal)

    def _stop_if_asked(self) -> None:
        """Heeds a signal that came during an evaluation; the state has just been saved."""
        signal = self.world.max(torch.tensor([self.signals.received], device=self.engine.device)).item()
        if signal:
            raise Interrupted(signal)

    def _save_state(self) -> None:
        with self.progress.paused():
            self.cadence.written(self.states.save(self.engine, self._position(), self.window))
            self.best.release()

    def _position(self) -> Position:
        self.at.seconds, self.at.best = self.progress.seconds(), self.best.kept
        self.at.metrics_bytes = self.metrics.bytes
        return self.at

    def _no_sums(self) -> Tensor:
        return torch.zeros(len(LossSums._fields), device=self.engine.device)

    def _log_train(self, epoch: int, mean: LossSums, lr: float, diagnostics: dict[str, float]) -> None:
        norm = self.engine.get_global_grad_norm()
        kd = {"kd": mean.kd} if self.teacher else {}
        values = {"loss": mean.loss, **kd, "ce": mean.ce, "accuracy": mean.correct, "lr": lr,
                  "gradient_norm": float(norm) if norm is not None and math.isfinite(norm) else None,
                  "samples_per_second": self.progress.samples_per_second(),
                  "peak_memory_gib": peak_memory_gib(self.engine.device)}
        self.metrics.write(kind="train", step=self.at.step, epoch=epoch, seconds=self.progress.seconds(), **values,
                           **diagnostics)
        losses = " ".join(f"{name} {values[name]:.4f}" for name in ("loss", *kd, "ce"))
        logger.info("epoch %d step %d/%d %s acc %.3f lr %.2e | %.1f samples/s, %.1f GiB, %s left",
                    epoch, self.at.step, self.max_steps, losses, mean.correct, lr,
                    values["samples_per_second"], values["peak_memory_gib"], self.progress.left(self.at.step))

    def _evaluate_and_save(self, epoch: int) -> None:
        self.engine.eval()
        started = time.perf_counter()
        mean = dev_loss(self.engine, self.dev, self.tokenizer.pad_token_id, self.world)
        model = self.engine.module.model
        score = Score(mean.ce, dev_rouge_l(model, self.dev, self.tokenizer, self.world) if self.dev.decoding else None)
        seconds = time.perf_counter() - started
        self.metrics.write(kind="dev", step=self.at.step, epoch=epoch, loss=score.loss, accuracy=mean.correct,
                           rouge_l=score.rouge_l, seconds=seconds)
        rouge = "" if score.rouge_l is None else f" rouge-l {score.rouge_l:.2f}"
        logger.info("dev after epoch %d: loss %.4f acc %.3f%s (%.0f s)",
                    epoch, score.loss, mean.correct, rouge, seconds)
        self.best.offer(score, epoch, self.at.step, partial(self._save, self.card(score.metrics)))

    def _save(self, card: str, folder: Path) -> None:
        save_model(self.engine.module.model, self.tokenizer, folder, card, writes_files=self.world.is_main)
        self.world.barrier()


def _with_following(plans: Iterator[StepPlan]) -> Iterator[tuple[StepPlan, StepPlan | None]]:
    """Each plan with the one after it."""
    plan = next(plans, None)
    while plan is not None:
        following = next(plans, None)
        yield plan, following
        plan = following
