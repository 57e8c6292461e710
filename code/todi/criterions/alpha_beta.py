"""The alpha-beta divergences, of which forward and reverse KL are two corners.

All powers of probabilities are taken by their logarithms, so that a small one keeps its digits. Sums and gradients of h
are as in `todi.criterions.divergences`.
"""

import math

import torch
from torch import Tensor

from todi.criterions.definitions import ABSENT, divergence, through_softmax
from todi.criterions.parameters import Parameter

# A power below this is taken for 0: both differ by less than float32 can tell.
_NO_POWER = 1e-9
# Where alpha + beta is less, what neither model gives would count.
_COUNTS_ABSENT = 1e-3


def power_gap(log_a: Tensor, log_b: Tensor, power: float, log_weight: Tensor) -> Tensor:
    """w (b^c - a^c) / c for c >= 0, (N, V), and w log b/a at c = 0; exactly 0 where a = b."""
    ratio = log_b - log_a
    if power < _NO_POWER:
        return log_weight.exp() * ratio
    gap = -torch.expm1(-power * ratio.abs()) / power
    return (log_weight + power * torch.maximum(log_a, log_b)).exp() * ratio.sign() * gap


def alpha_beta_gaps(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Of each entry's part of the divergence the derivatives by log q and by log p, both (N, V).

    They are q^beta (q^alpha - p^alpha) / alpha and p^alpha (p^beta - q^beta) / beta.
    """
    by_q = power_gap(log_p, log_q, alpha, beta * log_q)
    by_p = power_gap(log_q, log_p, beta, alpha * log_p)
    if alpha + beta < _COUNTS_ABSENT:
        absent = torch.maximum(log_p, log_q) < ABSENT
        by_q, by_p = by_q.masked_fill(absent, 0), by_p.masked_fill(absent, 0)
    return by_q, by_p


def abkd_gradient(log_p: Tensor, log_q: Tensor, *, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """h = q^beta (q^alpha - p^alpha) / alpha, and q^beta (log q - log p) for alpha = 0.

    Where alpha + beta = 1 its first part is a multiple of q, without which it keeps its digits.
    """
    h, by_p = alpha_beta_gaps(log_p, log_q, alpha, beta)
    value = by_p.add_(h).sum(-1).div_(alpha + beta) if alpha + beta else h.square().sum(-1).div_(2)
    if alpha and math.isclose(alpha + beta, 1):
        h = torch.add(alpha * log_p, log_q, alpha=beta).exp_().div_(-alpha)
    return value, through_softmax(h, log_q.exp())


ALPHA = Parameter(0.2, least=0, help="power of the ratio, where 1 is that of forward KL and 0 that of reverse KL")
BETA = Parameter(0.7, least=0, help="power of the student, where 0 is that of forward KL and 1 that of reverse KL")


@divergence("abkd", closed_form=abkd_gradient, alpha=ALPHA, beta=BETA)
def abkd(log_p: Tensor, log_q: Tensor, *, alpha: float, beta: float) -> Tensor:
    """The alpha-beta divergence of p and q (Wang et al., ABKD, ICML 2025).

    -1 / (alpha beta) sum [ p^alpha q^beta - alpha/s p^s - beta/s q^s ] with s = alpha + beta. As
    sum [ q^beta (q^alpha - p^alpha) / alpha + p^alpha (p^beta - q^beta) / beta ] / s it has its limits: forward KL at
    (1, 0), reverse KL at (0, 1), sum (log q - log p)^2 / 2 at (0, 0). The published code divides by alpha and beta in
    place of their squares where the other is 0; this is the paper's. The defaults are the paper's for GPT-2. Negative
    ones, for which an entry of no probability is worth without bound, are refused.
    """
    by_q, by_p = alpha_beta_gaps(log_p, log_q, alpha, beta)
    return (by_q + by_p).sum(-1) / (alpha + beta) if alpha + beta else by_q.square().sum(-1) / 2
