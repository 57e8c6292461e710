"""The alpha-beta divergence to a power mean of teacher and student, in place of one of the two (AMiD).

With a = (1 - alpha) / 2, the mixture is r ~ (lambda p^a + (1 - lambda) q^a)^(1/a). Gradients flow through it.
"""

import torch
from torch import Tensor

from todi.criterions.alpha_beta import ALPHA, BETA, abkd, abkd_gradient, alpha_beta_gaps
from todi.criterions.definitions import divergence, through_softmax
from todi.criterions.divergences import MIXTURE_ENDS, logit
from todi.criterions.parameters import Parameter

_PARAMETERS = {
    "alpha": Parameter(-5.0, least=-20, most=20, help="which mean: -1 the arithmetic, 1 the geometric, 3 the harmonic, "
                                                     "and the lower, the nearer to the larger of the two"),
    "skew_lambda": Parameter(0.1, **MIXTURE_ENDS, help="lambda, the teacher's share of the mixture"),
    "ab_alpha": ALPHA, "ab_beta": BETA}


def alpha_mixture(log_p: Tensor, log_q: Tensor, alpha: float, skew_lambda: float) -> tuple[Tensor, Tensor]:
    """log r, exactly log q where p = q; and its derivative by log q but for the norm of r, both (N, V)."""
    power, ratio = (1 - alpha) / 2, log_p - log_q
    if power == 0:
        return normalised(log_q + skew_lambda * ratio, log_q), torch.full_like(ratio, 1 - skew_lambda)
    ratio = power * ratio  # of p^a to q^a
    larger_p = ratio > 0
    smaller = torch.where(larger_p, ratio.new_full((), 1 - skew_lambda), ratio.new_full((), skew_lambda))
    over_larger = torch.log1p(smaller * torch.expm1(torch.where(larger_p, -ratio, ratio)))
    log_mean = torch.where(larger_p, log_p, log_q) + over_larger / power
    return normalised(log_mean, log_q), torch.sigmoid(-ratio - logit(skew_lambda))


def normalised(log_s: Tensor, log_q: Tensor) -> Tensor:
    """log of s / sum s, (N, V), for log_s <= 0 about; exactly log q where s is the distribution q."""
    surplus = (log_s.exp() - log_q.exp()).sum(-1, keepdim=True)
    near = torch.log1p(surplus.clamp_min(-0.5))
    return log_s - torch.where(surplus > -0.5, near, log_s.logsumexp(-1, keepdim=True))


def amid_gradient(log_p: Tensor, log_q: Tensor, *, alpha: float, skew_lambda: float, ab_alpha: float,
                  ab_beta: float) -> tuple[Tensor, Tensor]:
    """With G that of the alpha-beta divergence by log r and w = (1 - lambda) q^a / (lambda p^a + (1 - lambda) q^a),
    h = w (G - r sum G)."""
    log_r, weight = alpha_mixture(log_p, log_q, alpha, skew_lambda)
    value, by_r = abkd_gradient(log_p, log_r, alpha=ab_alpha, beta=ab_beta)
    return value, through_softmax(by_r.mul_(weight), log_q.exp())


@divergence("amid", closed_form=amid_gradient, **_PARAMETERS)
def amid(log_p: Tensor, log_q: Tensor, *, alpha: float, skew_lambda: float, ab_alpha: float, ab_beta: float) -> Tensor:
    """The alpha-beta divergence of p and the alpha-mixture r of p and q (AMiD, ICLR 2026, order pr).

    r is the power mean of p and q with power (1 - alpha) / 2, of which lambda is the teacher's share. `ab_alpha` and
    `ab_beta` are those of `abkd`; with 1 and 0 it is KL(p || r), which at alpha = -1 is `skewed_forward_kl`. The
    published code takes any alpha above 1 for 1; here it is what the paper says.
    """
    return abkd(log_p, alpha_mixture(log_p, log_q, alpha, skew_lambda)[0], alpha=ab_alpha, beta=ab_beta)


def amid_qr_gradient(log_p: Tensor, log_q: Tensor, *, alpha: float, skew_lambda: float, ab_alpha: float,
                     ab_beta: float) -> tuple[Tensor, Tensor]:
    """As `amid_gradient`, of the divergence of q and r; its derivative by log q at constant r is added."""
    log_r, weight = alpha_mixture(log_p, log_q, alpha, skew_lambda)
    value, by_r = abkd_gradient(log_q, log_r, alpha=ab_alpha, beta=ab_beta)
    _, direct = alpha_beta_gaps(log_q, log_r, ab_alpha, ab_beta)
    return value, through_softmax(by_r.mul_(weight).add_(direct), log_q.exp())


@divergence("amid_qr", closed_form=amid_qr_gradient, **_PARAMETERS)
def amid_qr(log_p: Tensor, log_q: Tensor, *, alpha: float, skew_lambda: float, ab_alpha: float,
            ab_beta: float) -> Tensor:
    """The alpha-beta divergence of q and the alpha-mixture r of p and q (AMiD, ICLR 2026, order qr).

    The mixture and the parameters are those of `amid`.
    """
    return abkd(log_q, alpha_mixture(log_p, log_q, alpha, skew_lambda)[0], alpha=ab_alpha, beta=ab_beta)
