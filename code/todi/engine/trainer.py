"""The training loop: plan, forward, backward, step; at the end of an epoch, dev and the checkpoint."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import DistillationCriterion, LossSums
from todi.data.batches import StepPlan, StepPlanner, collate
from todi.engine.checkpoints import BestCheckpoints, Score, save_model
from todi.engine.dev import DevSet, dev_loss, dev_rouge_l, means
from todi.engine.distributed import World
from todi.engine.logs import Metrics, peak_memory_gib
from todi.engine.teacher import TeacherSource

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the student inside `engine`; the teacher answers from outside it.

    Args:
        engine: a DeepSpeed engine around a `Student`, with optimizer and schedule.
        planner: this rank's cut of the training samples.
        teacher: None for SFT.
        folder: where checkpoints go.
        max_steps: the number of optimizer steps in all.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, *, planner: StepPlanner, dev: DevSet,
                 criterion: DistillationCriterion, teacher: TeacherSource | None, tokenizer: Tokenizer, world: World,
                 metrics: Metrics, folder: Path, keep_best: int, max_steps: int, log_interval: int,
                 eval_interval: int):
        self.engine = engine
        self.planner = planner
        self.dev = dev
        self.criterion = criterion
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.world = world
        self.metrics = metrics
        self.best = BestCheckpoints(folder, keep_best, writes_files=world.is_main)
        self.max_steps = max_steps
        self.log_interval = log_interval
        self.eval_interval = eval_interval
        self.step = 0

    def train(self) -> None:
        """Runs every epoch, evaluating and saving as it goes."""
        progress = _Progress(self.max_steps)
        last_epoch = -(-self.max_steps // self.planner.steps_per_epoch)
        for epoch in range(1, last_epoch + 1):
            self.engine.train()
            self._train_epoch(epoch, progress)
            if epoch % self.eval_interval == 0 or epoch == last_epoch:
                with progress.paused():
                    self._evaluate_and_save(epoch)

    def _train_epoch(self, epoch: int, progress: "_Progress") -> None:
        window = self._no_sums()  # of the steps since the last line of the log
        for plan in self.planner.epoch(epoch):
            last = self.step + 1 == self.max_steps
            logs = last or (self.step + 1) % self.log_interval == 0
            lr = self.engine.optimizer.param_groups[0]["lr"]  # the schedule moves on within the step
            sums, diagnostics = self._train_step(plan, with_diagnostics=logs)
            self.step += 1
            window += sums
            progress.samples += plan.samples
            if logs:
                self._log_train(epoch, means(self.world.sum(window)), lr, diagnostics, progress)
                window = self._no_sums()
            if last:
                break

    def _train_step(self, plan: StepPlan, with_diagnostics: bool) -> tuple[Tensor, dict[str, float]]:
        """One optimizer step: this rank's sums (5,) over its micro-batches, and diagnostics of the first."""
        sums, diagnostics = self._no_sums(), {}
        # DeepSpeed averages gradients over ranks; a step's loss is divided by the tokens of all ranks instead.
        scale = self.world.size / plan.tokens
        for sample_ids in plan.micro_batches:
            batch = collate(self.planner.examples, sample_ids, self.tokenizer.pad_token_id).to(self.engine.device)
            teacher = self.teacher.rows(batch) if self.teacher else None
            micro, report = self.engine(batch, self.criterion, teacher, with_diagnostics and not diagnostics)
            self.engine.backward(micro.loss * scale, scale_wrt_gas=False)
            self.engine.step()
            sums += torch.stack(micro).detach()
            diagnostics = diagnostics or report
        return sums, diagnostics

    def _no_sums(self) -> Tensor:
        return torch.zeros(len(LossSums._fields), device=self.engine.device)

    def _log_train(self, epoch: int, mean: LossSums, lr: float, diagnostics: dict[str, float],
                   progress: "_Progress") -> None:
        gradient_norm = self.engine.get_global_grad_norm()
        kd = {"kd": mean.kd} if self.teacher else {}
        values = {"loss": mean.loss, **kd, "ce": mean.ce, "accuracy": mean.correct, "lr": lr,
                  "gradient_norm": None if gradient_norm is None else float(gradient_norm),
                  "samples_per_second": progress.samples / progress.seconds(),
                  "peak_memory_gib": peak_memory_gib(self.engine.device)}
        self.metrics.write(kind="train", step=self.step, epoch=epoch, seconds=progress.seconds(), **values,
                           **diagnostics)
        losses = " ".join(f"{name} {values[name]:.4f}" for name in ("loss", *kd, "ce"))
        logger.info("epoch %d step %d/%d %s acc %.3f lr %.2e | %.1f samples/s, %.1f GiB, %s left",
                    epoch, self.step, self.max_steps, losses, mean.correct, lr,
                    values["samples_per_second"], values["peak_memory_gib"], progress.left(self.step))

    def _evaluate_and_save(self, epoch: int) -> None:
        self.engine.eval()
        started = time.perf_counter()
        mean = dev_loss(self.engine, self.dev, self.tokenizer.pad_token_id, self.world)
        model = self.engine.module.model
        score = Score(mean.ce, dev_rouge_l(model, self.dev, self.tokenizer, self.world) if self.dev.decoding else None)
        seconds = time.perf_counter() - started
        self.metrics.write(kind="dev", step=self.step, epoch=epoch, loss=score.loss, accuracy=mean.correct,
                           rouge_l=score.rouge_l, seconds=seconds)
        rouge = "" if score.rouge_l is None else f" rouge-l {score.rouge_l:.2f}"
        logger.info("dev after epoch %d: loss %.4f acc %.3f%s (%.0f s)",
                    epoch, score.loss, mean.correct, rouge, seconds)
        self.best.offer(score, epoch, self.step, self._save)

    def _save(self, folder: Path) -> None:
        save_model(self.engine.module.model, self.tokenizer, folder, writes_files=self.world.is_main)
        self.world.barrier()


class _Progress:
    """Speed and time left, evaluations apart."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.samples = 0
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def left(self, step: int) -> str:
        """Estimated time left, h:mm:ss."""
        seconds = int(self.seconds() / step * (self.total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
