"""What a divergence is doing: a few numbers on a sample of rows, off the hot path."""

from collections.abc import Mapping

import torch
from torch import Tensor

from todi.criterions.definitions import Divergence, log_probabilities


@torch.no_grad()
def diagnose(student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence,
             temperature: float = 1.0) -> dict[str, Tensor]:
    """Sums over the rows of (N, V) logits, at the temperature of the divergence; `diagnosis` makes means of them.

    They add up over blocks of rows, micro-batches and ranks.
    """
    log_p, log_q = log_probabilities(student_logits, teacher_logits, temperature)
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    sums = {
        "rows": log_p.new_tensor(float(len(log_p))),
        "teacher_entropy": -(p * log_p).sum(),
        "student_entropy": -(q * log_q).sum(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().sum(),
        "forward_kl": (p * ratio).sum(),
        "reverse_kl": -(q * ratio).sum(),
    }
    weight = divergence.entry_weight(log_p, log_q)
    if weight is not None:
        sums |= {"forward_share": (weight * p * ratio).sum(), "reverse_share": -((1 - weight) * q * ratio).sum(),
                 "weight_under_p": (weight * p).sum(), "weight_under_q": (weight * q).sum()}
    return sums


def diagnosis(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the rows whose sums `diagnose` gave.

    Returns:
        `teacher_entropy` and `student_entropy` (nats), `top1_agreement` (share of rows), `forward_kl`,
        `reverse_kl`, and, for a divergence that mixes the two per entry with a weight w as ToDi does,
        `forward_share` and `reverse_share` of its value, `weight_under_p` and `weight_under_q` (mean of w).
        Nothing of no rows.
    """
    if not sums:
        return {}
    means = {name: value / sums["rows"] for name, value in sums.items() if name != "rows"}
    if "forward_share" in sums:
        value = sums["forward_share"] + sums["reverse_share"]
        share = sums["forward_share"] / value if value else 0.5  # p = q: no loss to share
        means |= {"forward_share": share, "reverse_share": 1 - share}
    return means
