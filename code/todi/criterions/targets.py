"""What a student is compared with in place of its teacher: mixtures of both models' logits."""

import torch
from torch import Tensor

from todi.criterions.alpha_mixture import normalised
from todi.criterions.parameters import Parameter
from todi.criterions.parts import target


@target("interpolated", t=Parameter(0.5, least=0, most=1, help="the teacher's share of the logits"))
def interpolated(log_p: Tensor, log_q: Tensor, *, t: float) -> Tensor:
    """softmax((1 - t) z_q + t z_p), the student at t = 0 and the teacher at t = 1 (Shing et al., TAID, ICLR 2025)."""
    return normalised(torch.lerp(log_q, log_p, t), log_q)


@target("sharpened", beta=Parameter(0.8, least=0, help="how much of the student's logits is added"))
def sharpened(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """softmax(z_p + beta z_q), which is p q^beta but for its norm (Veto, Findings of ACL 2026)."""
    return torch.log_softmax(torch.add(log_p, log_q, alpha=beta), -1)
