"""AdamW, the schedule of its learning rate, and the DeepSpeed engine around both."""

from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from todi.schedules import SCHEDULES

# Of a group of parameters: what a setting decides, and its name.
_GROUP_SETTINGS = {"initial_lr": "lr", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips its gradients, and leaves out an update whose gradients are not finite.

    DeepSpeed's wrappers do that for the optimizer that they wrap. Without ZeRO, in fp32, there is none; DeepSpeed then
    clips without telling the norm, and looks for `overflow` and `_global_grad_norm` here.

    Args:
        clip_grad: largest norm of all gradients; 0 does not clip.
    """

    overflow = False
    _global_grad_norm: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, clip_grad: float, **settings: Any):
        super().__init__(groups, **settings)
        self.clip_grad = clip_grad

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """A step with clipped gradients; none where their norm is not finite, which `overflow` then says."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = get_total_norm(gradients)
        self.overflow = not self._global_grad_norm.isfinite()
        if self.overflow:
            return
        if self.clip_grad > 0:
            torch._foreach_mul_(gradients, (self.clip_grad / (self._global_grad_norm + 1e-6)).clamp(max=1.0))
        super().step()


def build_optimizer(model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
                    clip_grad: float = 0.0, stage: int = 1) -> torch.optim.AdamW:
    """AdamW on the trainable parameters; one-dimensional ones (norms, biases) do not decay.

    Args:
        clip_grad: largest gradient norm.
        stage: of ZeRO. From 1 on DeepSpeed wraps the optimizer and clips.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if stage else partial(ClippingAdamW, clip_grad=clip_grad)
    return kind([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def wrap(model: nn.Module, optimizer: torch.optim.AdamW, schedule: LambdaLR,
         config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine of a model; it does not clip for an optimizer that does so itself."""
    # DeepSpeed's timer of the throughput makes a GPU wait twice a micro-batch, whether anything is printed or not.
    config = config | {"timers": {"throughput": {"enabled": False}}}
    # A step tells where it ends, for it may have any number of micro-batches. Told that it has one, DeepSpeed would not
    # add up gradients that it offloads.
    config = config | {"gradient_accumulation_steps": max(2, config["gradient_accumulation_steps"])}
    if isinstance(optimizer, ClippingAdamW):
        config = config | {"gradient_clipping": 0.0}
    zero = config["zero_optimization"]
    if dist.get_world_size() == 1 and zero["stage"] in (1, 2):  # a DeepSpeed file may want them contiguous
        config = config | {"zero_optimization": {"contiguous_gradients": False} | zero}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]
    _check_gradients_once(engine.optimizer)
    _reduce_nothing_alone(engine.optimizer)
    go_on_at_the_least_loss_scale(engine)
    return engine


def go_on_at_the_least_loss_scale(engine: deepspeed.DeepSpeedEngine) -> None:
    """DeepSpeed would raise when an update is left out in fp16 and the loss scale cannot be lowered.

    Such a step is one as any other whose gradients are not finite. A loaded state brings a loss scale of its own.
    """
    scale = getattr(engine.optimizer, "loss_scaler", None)
    if isinstance(scale, DynamicLossScaler):
        scale.raise_error_at_min_scale = False


def lowers_loss_scale(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether an update that was left out, in fp16, may have been so for its loss scale, which can still be lowered."""
    scale = getattr(engine.optimizer, "loss_scaler", None)
    return isinstance(scale, DynamicLossScaler) and scale.cur_scale > scale.min_scale


def _check_gradients_once(optimizer: object) -> None:
    """ZeRO 1 and 2 look for infinities in each gradient by itself, wait for the answer, and then look at the norm of
    all of them, which is not finite either where one of them is not. The norm alone says it with a wait less, and
    without four kernels for each gradient.

    With an optimizer in the host's memory each gradient is looked at on its way there; that stays.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients: None


def _reduce_nothing_alone(optimizer: object) -> None:
    """A rank by itself has no others to add its gradients up with, and they stay where backward left them. ZeRO 1 and 2
    would copy them into a bucket, divide by one, and copy them back."""
    if (isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.contiguous_gradients
            and dist.get_world_size() == 1):
        optimizer.buffered_reduce_fallback = lambda *given, **named: None


def build_schedule(optimizer: torch.optim.Optimizer, name: str, *, total_steps: int, warmup_steps: int, lr: float,
                   lr_min: float) -> LambdaLR:
    """The schedule called `name`, after a linear warm-up; it is stepped once per optimizer step."""
    schedule, floor = SCHEDULES[name], min(lr_min / lr, 1.0)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return schedule(step, total_steps, warmup_steps, floor)

    return LambdaLR(optimizer, factor)


class OptimizerSettings:
    """What the settings say of an engine's optimizer: it is built with that, but a state brings the old ones along."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self.engine = engine
        self.groups = [{name: group[name] for name in _GROUP_SETTINGS} for group in engine.optimizer.param_groups]
        self.clip_grad = engine.optimizer.clip_grad

    def put_back(self) -> list[str]:
        """Undoes what loading a state did to them; what differed, as 'lr 0.1 -> 0.01'."""
        optimizer, schedule, changes = self.engine.optimizer, self.engine.lr_scheduler, []
        for group, wanted in zip(optimizer.param_groups, self.groups, strict=True):
            changes += [f"{shown} {group[name]} -> {wanted[name]}" for name, shown in _GROUP_SETTINGS.items()
                        if group[name] != wanted[name]]
            group.update(wanted)
        if optimizer.clip_grad != self.clip_grad:
            changes.append(f"clip_grad {optimizer.clip_grad} -> {self.clip_grad}")
            optimizer.clip_grad = self.clip_grad
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        rates = [lr * factor(schedule.last_epoch)
                 for lr, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        if rates != schedule._last_lr:
            changes.append(f"lr of the next step {schedule._last_lr[0]} -> {rates[0]}")
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
        return list(dict.fromkeys(changes))
