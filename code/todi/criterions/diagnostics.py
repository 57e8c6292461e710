"""What a divergence is doing: a few numbers on a sample of rows, off the hot path."""

import torch
from torch import Tensor

from todi.criterions.divergences import Divergence, log_probabilities


@torch.no_grad()
def diagnose(student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence,
             temperature: float = 1.0) -> dict[str, float]:
    """Means over the rows of (N, V) logits, at the temperature of the divergence.

    Returns:
        `teacher_entropy` and `student_entropy` (nats), `top1_agreement` (share of rows), `forward_kl`,
        `reverse_kl`, and, for a divergence that mixes the two per entry with a weight w as ToDi does,
        `forward_share` and `reverse_share` of its value, `weight_under_p` and `weight_under_q` (mean of w).
    """
    log_p, log_q = log_probabilities(student_logits, teacher_logits, temperature)
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    report = {
        "teacher_entropy": -(p * log_p).sum(-1).mean(),
        "student_entropy": -(q * log_q).sum(-1).mean(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(),
        "forward_kl": (p * ratio).sum(-1).mean(),
        "reverse_kl": -(q * ratio).sum(-1).mean(),
    }
    weight = divergence.entry_weight(log_p, log_q)
    if weight is not None:
        forward, reverse = (weight * p * ratio).sum(), -((1 - weight) * q * ratio).sum()
        share = forward / (forward + reverse)
        share = share.nan_to_num(0.5)  # p = q: no loss to share
        report |= {"forward_share": share, "reverse_share": 1 - share,
                   "weight_under_p": (weight * p).sum(-1).mean(), "weight_under_q": (weight * q).sum(-1).mean()}
    return {name: value.item() for name, value in report.items()}
