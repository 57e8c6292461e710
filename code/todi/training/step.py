"""One optimizer step: forward and backward of its micro-batches, with one division by the tokens of all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass

import deepspeed
import torch
from torch import Tensor

from todi.criterions import DistillationCriterion
from todi.data.batches import collate
from todi.data.plans import StepPlan
from todi.runtime.distributed import World
from todi.teacher.source import TeacherSource

Sums = Mapping[str, Tensor]  # scalars by the name of what was summed; `tokens` is what to divide them by


@dataclass(frozen=True)
class StepResult:
    """What a step gave on this rank.

    Attributes:
        sums: over its labelled rows; zeros where the optimizer left the step out.
        finite: of a step that the optimizer left out, for its gradients were not finite: whether the loss of each
            micro-batch is. None of a step that was taken.
        diagnostics: of the divergence, on some rows of one micro-batch, when asked for.
    """

    sums: Sums
    finite: tuple[bool, ...] | None
    diagnostics: Mapping[str, float]


class TrainStep:
    """Trains the student inside `engine`; the teacher answers from outside it.

    Args:
        engine: a DeepSpeed engine around a `Student`, with optimizer and schedule.
        teacher: None for SFT.
        pad_id: token that fills a micro-batch up.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, criterion: DistillationCriterion,
                 teacher: TeacherSource | None, pad_id: int, world: World):
        self.engine = engine
        self.criterion = criterion
        self.teacher = teacher
        self.pad_id = pad_id
        self.world = world

    @property
    def lr(self) -> float:
        """Of the next step."""
        return self.engine.optimizer.param_groups[0]["lr"]

    def expect(self, plan: StepPlan) -> None:
        """Says what comes next, so that a teacher can fetch it meanwhile."""
        if self.teacher:
            self.teacher.expect([example.sample_id for examples in plan.micro_batches for example in examples])

    def __call__(self, plan: StepPlan, with_diagnostics: bool = False) -> StepResult:
        """Runs all micro-batches of `plan` and the optimizer."""
        parts, diagnostics = [], {}
        # DeepSpeed averages gradients over ranks; a step's loss is divided by the tokens of all ranks instead.
        scale = self.world.size / plan.tokens
        for examples in plan.micro_batches:
            batch = collate(examples, self.pad_id).to(self.engine.device)
            teacher = self.teacher.rows(batch) if self.teacher else None
            sums, report = self.engine(batch, self.criterion, teacher, with_diagnostics and not diagnostics)
            self.engine.backward(sums["loss"] * scale, scale_wrt_gas=False)
            self.engine.step()
            parts.append(torch.stack(tuple(sums.values())).detach())
            diagnostics = diagnostics or report
        by_part, names = torch.stack(parts), tuple(sums)
        if self.engine.was_step_applied():
            return StepResult(dict(zip(names, by_part.sum(0), strict=True)), None, diagnostics)
        finite = by_part[:, names.index("loss")].isfinite().tolist()
        return StepResult(dict.fromkeys(names, by_part.new_zeros(())), tuple(finite), diagnostics)


def add(sums: Sums, more: Sums) -> Sums:
    """The sum of each name that `more` has."""
    return {name: sums[name] + value if name in sums else value for name, value in more.items()}


def means(sums: Sums, world: World) -> dict[str, float]:
    """Sums of all ranks over their tokens, as floats, the number of tokens apart; the only division there is."""
    values = dict(zip(sums, world.sum(torch.stack(tuple(sums.values()))).tolist(), strict=True))
    return {name: value / max(values["tokens"], 1) for name, value in values.items() if name != "tokens"}
