"""Divergences of which one token of each row is an estimate, for text that the student has written itself."""

import torch
from torch import Tensor

from todi.criterions.definitions import ABSENT, divergence


def _log_ratio(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """(N,) log q - log p of the labels; 0 for one that neither model gives, where it would be noise."""
    log_p, log_q = (side.gather(-1, labels[:, None]).squeeze(-1) for side in (log_p, log_q))
    return (log_q - log_p).masked_fill(log_q < ABSENT, 0)


def sampled_gradient(log_p: Tensor, log_q: Tensor, *, labels: Tensor) -> tuple[Tensor, Tensor]:
    """h = log q - log p at the label, 0 elsewhere."""
    ratio = _log_ratio(log_p, log_q, labels)
    gradient = log_q.exp().mul_(-ratio[:, None])
    return ratio, gradient.scatter_add_(-1, labels[:, None], ratio[:, None])


@divergence("sampled_reverse_kl", closed_form=sampled_gradient, sampled=True)
def sampled_reverse_kl(log_p: Tensor, log_q: Tensor, *, labels: Tensor) -> Tensor:
    """log q(y) - log p(y) of the label y, as a reward in a policy gradient (on-policy distillation, 2025).

    The gradient is that of -A log q(y) with the advantage A = log p(y) - log q(y) constant: the step that
    Thinking Machines Lab's on-policy distillation takes on fresh text, where the importance ratio is 1. Over y ~ q its
    mean is exactly the gradient of `reverse_kl`, as the mean of its value is that divergence; that of the value itself
    would be 0. So the labels have to be the student's own text, sampled at the temperature of the divergence; on other
    text it is no divergence. A value may be below 0.
    """
    ratio = _log_ratio(log_p, log_q.detach(), labels)
    log_q = log_q.gather(-1, labels[:, None]).squeeze(-1)
    return torch.addcmul(ratio, ratio, log_q - log_q.detach())
