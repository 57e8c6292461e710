"""What moves the parameters of a `todi.ToDiTrainer`'s divergence: its schedule, once an optimizer step."""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

from todi.criterions import Schedule

if TYPE_CHECKING:
    from todi.hf_trainer import ToDiTrainer

_STATE = "ToDiTrainer schedule"  # where it lies in trainer_state.json


class ScheduleSteps(TrainerCallback):
    """Has the schedule of a trainer's criterion go on with its steps, and its state be in the trainer's checkpoints.

    Attributes:
        values: of the step before, for the log; nothing for a divergence that stays as it is.
    """

    def __init__(self, trainer: "ToDiTrainer"):
        self.trainer = trainer
        self.schedule: Schedule | None = None
        self.values: dict[str, float] = {}
        self._step: list[Tensor] = []  # sums of the micro-batches of this step

    def see(self, sums: Tensor) -> None:
        """Sums of a micro-batch."""
        if self.schedule:
            self._step.append(sums)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *words: Any, **more: Any) -> None:
        self.schedule = self.trainer.criterion.schedule(state.max_steps)
        if self.schedule:
            self.schedule.load_state_dict(state.stateful_callbacks.get(_STATE, {}))
            self._move()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *words: Any, **more: Any) -> None:
        if self.schedule:
            self.values = {f"kd_{name}": value for name, value in self.schedule.values.items()}
            counts = self.schedule.watches and not self.trainer.accelerator.optimizer_step_was_skipped
            self.schedule.advance(self.trainer.means(self._step, with_loss=True) if counts else None)
            self._step = []
            self._move()
            state.stateful_callbacks[_STATE] = self.schedule.state_dict()

    def _move(self) -> None:
        self.trainer.criterion = self.trainer.criterion.at(self.schedule.values)
