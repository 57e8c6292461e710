"""AdamW, and the schedule of its learning rate."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from todi.schedules import SCHEDULES


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves out an update whose gradients are not finite and says so in `overflow`.

    DeepSpeed's wrappers do that for the optimizer that they wrap. Without ZeRO, in fp32, there is none, and DeepSpeed
    looks for `overflow` here.
    """

    overflow = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm(gradients)
        self.overflow = not torch.stack([norm.float() for norm in norms]).sum().isfinite()
        if not self.overflow:
            super().step()


def build_optimizer(model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float,
                    weight_decay: float, skip_bad_steps: bool = False) -> torch.optim.AdamW:
    """AdamW on the trainable parameters; one-dimensional ones (norms, biases) do not decay.

    Args:
        skip_bad_steps: skip steps that are not finite; for the optimizer that DeepSpeed does not wrap.
    """
    kind = SkippingAdamW if skip_bad_steps else torch.optim.AdamW
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return kind([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, name: str, *, total_steps: int, warmup_steps: int, lr: float,
                   lr_min: float) -> LambdaLR:
    """The schedule called `name`, after a linear warm-up; it is stepped once per optimizer step."""
    schedule, floor = SCHEDULES[name], min(lr_min / lr, 1.0)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return schedule(step, total_steps, warmup_steps, floor)

    return LambdaLR(optimizer, factor)
