"""One optimizer step: forward and backward of its micro-batches, with one division by the tokens of all ranks."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import deepspeed
import torch
from torch import Tensor

from todi.criterions import DistillationCriterion, Schedule, diagnosis
from todi.data.batches import Batch, Collate
from todi.data.plans import StepPlan
from todi.data.tokenize import Example
from todi.runtime.distributed import World
from todi.runtime.whereabouts import HERE
from todi.teacher.source import TeacherSource
from todi.training.speed import Meter

DIAGNOSED_ROWS = 128  # of a step: enough for means to two digits, small beside a micro-batch

Sums = Mapping[str, Tensor]  # scalars by the name of what was summed; `tokens` is what to divide them by


@dataclass(frozen=True)
class StepResult:
    """What a step gave on this rank.

    Attributes:
        sums: over its labelled rows; zeros where the optimizer left the step out.
        finite: of a step that the optimizer left out, for its gradients were not finite: whether the loss of each
            micro-batch is. None of a step that was taken.
        diagnostics: of the divergence when asked for: over the first rows of every sample of the step, on all ranks.
        moved: values of the parameters that a schedule moves, in this step.
    """

    sums: Sums
    finite: tuple[bool, ...] | None
    diagnostics: Mapping[str, float]
    moved: Mapping[str, float] = field(default_factory=dict)


class TrainStep:
    """Trains the student inside `engine`; the teacher answers from outside it.

    Args:
        engine: a DeepSpeed engine around a `Student`, with optimizer and schedule.
        teacher: None for SFT.
        collate: makes the batch of the samples of a micro-batch.
        meter: is told what is done when.
        schedule: of parameters of the criterion; None where they stay as they are.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, criterion: DistillationCriterion,
                 teacher: TeacherSource | None, collate: Collate, world: World, meter: Meter | None = None,
                 schedule: Schedule | None = None):
        self.engine = engine
        self.criterion = criterion
        self.teacher = teacher
        self.collate = collate
        self.world = world
        self.meter = meter or Meter()
        self.schedule = schedule
        self._pool = ThreadPoolExecutor(1)
        self._ahead: tuple[StepPlan, Future[list[Batch]]] | None = None

    @property
    def lr(self) -> float:
        """Of the next step."""
        return self.engine.optimizer.param_groups[0]["lr"]

    def expect(self, plan: StepPlan) -> None:
        """Says what comes next, so that its batches are made and a teacher can fetch it meanwhile."""
        self._ahead = plan, self._pool.submit(self._make, plan)
        if self.teacher:
            self.teacher.expect([example.sample_id for examples in plan.micro_batches for example in examples])

    def close(self) -> None:
        """Gives back the thread that makes batches ahead."""
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, plan: StepPlan, with_diagnostics: bool = False) -> StepResult:
        """Runs all micro-batches of `plan` and the optimizer."""
        parts, report, moved = [], Counter(), self.schedule.values if self.schedule else {}
        criterion = self.criterion.at(moved) if self.schedule else self.criterion
        # DeepSpeed averages gradients over ranks; a step's loss is divided by the tokens of all ranks instead.
        scale = self.world.size / plan.tokens
        with self.meter.phase("data"):
            batches = self._batches(plan)
        for number, (examples, batch) in enumerate(zip(plan.micro_batches, batches, strict=True), start=1):
            # Before each forward, since the number of micro-batches may differ from step to step.
            self.engine.set_gradient_accumulation_boundary(number == len(plan.micro_batches))
            self.meter.count(examples, batch.input_ids.numel())
            with self.meter.phase("data"):
                batch = batch.to(self.engine.device)
            with self.meter.phase("teacher"):
                teacher = self.teacher.rows(batch) if self.teacher else None
            diagnosed = first_rows(examples, plan.samples) if with_diagnostics else ()
            with self.meter.phase("student"):
                sums, more = self.engine(batch, criterion, teacher, diagnosed)
                self.engine.backward(sums["loss"] * scale, scale_wrt_gas=False)
            with self.meter.phase("optimizer"):
                self.engine.step()
            parts.append(torch.stack(tuple(sums.values())).detach())
            report.update(more)  # adds them up
            HERE.tick()
        diagnostics = self._diagnosis(report) if with_diagnostics else {}
        by_part, names = torch.stack(parts), tuple(sums)
        if self.engine.was_step_applied():
            sums = dict(zip(names, by_part.sum(0), strict=True))
            self._advance(sums)
            return StepResult(sums, None, diagnostics, moved)
        self._advance(None)
        finite = by_part[:, names.index("loss")].isfinite().tolist()
        return StepResult(dict.fromkeys(names, by_part.new_zeros(())), tuple(finite), diagnostics, moved)

    def _advance(self, sums: Sums | None) -> None:
        """Has the schedule go on, by the means of all ranks where it wants them; without `sums` of a step left out."""
        if self.schedule:
            self.schedule.advance(means(sums, self.world) if sums and self.schedule.watches else None)

    def _batches(self, plan: StepPlan) -> list[Batch]:
        if self._ahead and self._ahead[0] is plan:
            return self._ahead[1].result()
        return self._make(plan)

    def _make(self, plan: StepPlan) -> list[Batch]:
        batches = [self.collate(examples) for examples in plan.micro_batches]
        return [batch.pinned() for batch in batches] if self.engine.device.type == "cuda" else batches

    def _diagnosis(self, sums: Sums) -> dict[str, float]:
        total: Counter[str] = Counter()
        for part in self.world.gather({name: value.item() for name, value in sums.items()}):
            total.update(part)
        return diagnosis(total)


def first_rows(examples: Sequence[Example], samples: int) -> list[slice]:
    """Of the labelled rows of a micro-batch the first of each sample, so many that `samples` make `DIAGNOSED_ROWS`.

    They are the same rows of a step however it is cut into micro-batches.
    """
    ends = itertools.accumulate(example.response_tokens for example in examples)
    most = max(1, DIAGNOSED_ROWS // samples)
    return [slice(end - example.response_tokens, end - max(0, example.response_tokens - most))
            for end, example in zip(ends, examples, strict=True)]


def add(sums: Sums, more: Sums) -> Sums:
    """The sum of each name that `more` has."""
    return {name: sums[name] + value if name in sums else value for name, value in more.items()}


def means(sums: Sums, world: World) -> dict[str, float]:
    """Sums of all ranks over their tokens, as floats, the number of tokens apart; the only division there is."""
    values = dict(zip(sums, world.sum(torch.stack(tuple(sums.values()))).tolist(), strict=True))
    return {name: value / max(values["tokens"], 1) for name, value in values.items() if name != "tokens"}
