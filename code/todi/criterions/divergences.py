"""Kullback-Leibler divergences and what is mixed of them: value, closed-form gradient and parameters of each.

With h = d value / d log q, each entry of log q taken as independent, the gradient for the logits (over temperature) is
h - q sum h. Adding a multiple of q to h changes nothing of it: the closed forms choose the multiple that keeps the
digits of float32 where p and q share no mass. `todi.criterions.definitions` has what a divergence is.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from todi.criterions.definitions import divergence, through_softmax
from todi.criterions.parameters import Parameter


def forward_kl_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """h = -p, whose sum is -1."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp().sub_(p)


@divergence("forward_kl", closed_form=forward_kl_gradient)
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) (Hinton et al., 2015)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """h = q (log q - log p - value), whose sum is 0 but for rounding."""
    q = log_q.exp()
    value = torch.linalg.vecdot(q, log_q - log_p)
    return value, through_softmax(_log_ratio(log_q, log_p, value).mul_(q), q)


@divergence("reverse_kl", closed_form=reverse_kl_gradient)
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p) (Gu et al., MiniLLM, ICLR 2024)."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def js_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """h = -q log(1 + p/q) / 2."""
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    over_larger = _log_mixture_over_larger(ratio, 0.5)
    value = (torch.linalg.vecdot(p, ratio.clamp(max=0).sub_(over_larger))
             - torch.linalg.vecdot(q, ratio.clamp(min=0).add_(over_larger)))
    return value.mul_(0.5), through_softmax(softplus(ratio).mul_(q).mul_(-0.5), q)


@divergence("js_divergence", closed_form=js_gradient)
def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 (Lin, 1991)."""
    log_m = _log_mixture(log_p, log_q, 0.5)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


# Closer to 0 or 1, float32 takes the mixture for one of its sides.
MIXTURE_ENDS = {"least": 1e-6, "most": 1 - 1e-6}


def gkd_gradient(log_p: Tensor, log_q: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """h = -(1 - beta) q log(1 + beta p / ((1 - beta) q))."""
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    over_larger = _log_mixture_over_larger(ratio, beta)
    value = (beta * torch.linalg.vecdot(p, ratio.clamp(max=0).sub_(over_larger))
             - (1 - beta) * torch.linalg.vecdot(q, ratio.clamp(min=0).add_(over_larger)))
    return value, through_softmax(softplus(ratio.add_(logit(beta))).mul_(q).mul_(beta - 1), q)


@divergence("gkd", closed_form=gkd_gradient,
            beta=Parameter(0.5, **MIXTURE_ENDS, help="the teacher's share of the mixture, and of the value"))
def gkd(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al., GKD, ICLR 2024).

    Over beta it nears forward KL as beta nears 0, over 1 - beta it nears reverse KL as beta nears 1; at the ends it
    is 0. Implementations that take the two KLs there jump in scale.
    """
    log_m = _log_mixture(log_p, log_q, beta)
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)


def tvd_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """h = -q where p > q, 0 elsewhere, put through softmax by two sums of one sign, which lose no digits."""
    q = log_q.exp()
    value = 0.5 * (log_p.exp() - q).abs_().sum(-1)
    under = (log_p > log_q).to(q.dtype).mul_(q)
    over = q.sub_(under)  # one of the two is 0, the other q
    mass_under, mass_over = (side.sum(-1, keepdim=True) for side in (under, over))
    return value, over.mul_(mass_under).addcmul_(under, mass_over, value=-1)


@divergence("tvd", closed_form=tvd_gradient)
def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation distance, sum |p - q| / 2 (Wen et al., f-DISTILL, ACL 2023)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


SKEW = Parameter(0.1, **MIXTURE_ENDS, help="lambda, the share of the first distribution in the mixture")


def skewed_forward_kl_gradient(log_p: Tensor, log_q: Tensor, *, skew_lambda: float) -> tuple[Tensor, Tensor]:
    """With m = lambda p + (1 - lambda) q, h = -p (1 - lambda) q / m."""
    p, ratio = log_p.exp(), log_p - log_q
    value = torch.linalg.vecdot(p, ratio.clamp(max=0).sub_(_log_mixture_over_larger(ratio, skew_lambda)))
    share = ratio.neg_().sub_(logit(skew_lambda)).sigmoid_()  # (1 - lambda) q / m
    return value, through_softmax(p.mul_(share).neg_(), log_q.exp())


@divergence("skewed_forward_kl", closed_form=skewed_forward_kl_gradient, skew_lambda=SKEW)
def skewed_forward_kl(log_p: Tensor, log_q: Tensor, *, skew_lambda: float) -> Tensor:
    """KL(p || lambda p + (1 - lambda) q) (Ko et al., DistiLLM, ICML 2024)."""
    return (log_p.exp() * (log_p - _log_mixture(log_p, log_q, skew_lambda))).sum(-1)


# Below this share y of p in the mixture, y + log(1 - y) loses more digits than its series loses terms.
SMALL_SHARE = 0.02


def skewed_reverse_kl_gradient(log_p: Tensor, log_q: Tensor, *, skew_lambda: float) -> tuple[Tensor, Tensor]:
    """With m = (1 - lambda) p + lambda q and y = (1 - lambda) p / m, h = q (y + log(1 - y))."""
    q, ratio = log_q.exp(), log_p - log_q
    value = -torch.linalg.vecdot(q, ratio.clamp(min=0).add_(_log_mixture_over_larger(ratio, 1 - skew_lambda)))
    odds = ratio.sub_(logit(skew_lambda))  # log y / (1 - y)
    share = odds.sigmoid()
    series = (share / 4).add_(1 / 3).mul_(share).add_(0.5).mul_(share).mul_(share).neg_()
    small = (share < SMALL_SHARE).to(share.dtype)
    h = torch.lerp(share.sub_(softplus(odds)), series, small).mul_(q)
    return value, through_softmax(h, q)


@divergence("skewed_reverse_kl", closed_form=skewed_reverse_kl_gradient, skew_lambda=SKEW)
def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, *, skew_lambda: float) -> Tensor:
    """KL(q || (1 - lambda) p + lambda q) (Ko et al., DistiLLM, ICML 2024)."""
    return (log_q.exp() * (log_q - _log_mixture(log_p, log_q, 1 - skew_lambda))).sum(-1)


def detached_gradient(log_p: Tensor, log_q: Tensor, *, skew_lambda: float) -> tuple[Tensor, Tensor]:
    """With m as before and constant, h = q log(1 - y)."""
    q, ratio = log_q.exp(), log_p - log_q
    value = -torch.linalg.vecdot(q, ratio.clamp(min=0).add_(_log_mixture_over_larger(ratio, 1 - skew_lambda)))
    return value, through_softmax(softplus(ratio.sub_(logit(skew_lambda))).mul_(q).neg_(), q)


@divergence("skewed_reverse_kl_detached", closed_form=detached_gradient, skew_lambda=SKEW)
def skewed_reverse_kl_detached(log_p: Tensor, log_q: Tensor, *, skew_lambda: float) -> Tensor:
    """KL(q || (1 - lambda) p + lambda q), where nothing flows through the mixture (Ko et al., DistiLLM-2, ICML 2025).

    So it is in the code of DistiLLM-2; in that of DistiLLM, whose is `skewed_reverse_kl`, gradients flow through it.
    """
    return (log_q.exp() * (log_q - _log_mixture(log_p, log_q.detach(), 1 - skew_lambda))).sum(-1)


@torch.no_grad()
def adaptive_kl_weight(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """w, (N,): the share of the teacher's head in sum |p - q|; 1/2 where p = q.

    Probabilities are sorted alone, without where they come from: the smallest of the head tells which the others are.
    Of those that are equal to it, the first are in the tail as far as they fit in, as in a stable sort.
    """
    p = log_p.exp()
    gap = (p - log_q.exp()).abs_()
    ascending = _sorted(p)
    in_tail = (ascending.cumsum(-1, dtype=torch.float64) <= alpha).sum(-1, keepdim=True)
    smallest = ascending.gather(-1, in_tail.clamp(max=p.shape[-1] - 1))
    equal_in_tail = in_tail - torch.searchsorted(ascending, smallest)
    equal = p == smallest
    head = (p > smallest).logical_or_(equal.logical_and_(equal.cumsum(-1, dtype=torch.int32) > equal_in_tail))
    share, total = torch.linalg.vecdot(gap, head.to(gap.dtype)), gap.sum(-1)
    return torch.where(total > 0, share / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)


def _sorted(values: Tensor) -> Tensor:
    """Ascending along the last dimension. On a CPU NumPy is 20 times as fast as torch, which sorts indices along."""
    return torch.from_numpy(np.sort(values.numpy(), -1)) if values.device.type == "cpu" else values.sort(-1).values


def adaptive_kl_gradient(log_p: Tensor, log_q: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """h = (1 - w) q (log q - log p - reverse KL) - w p."""
    weight = adaptive_kl_weight(log_p, log_q, alpha)
    p, q, ratio = log_p.exp(), log_q.exp(), log_q - log_p
    forward, reverse = -torch.linalg.vecdot(p, ratio), torch.linalg.vecdot(q, ratio)
    h = _log_ratio(log_q, log_p, reverse).mul_(q).mul_(1 - weight[:, None]).sub_(p.mul_(weight[:, None]))
    return weight * forward + (1 - weight) * reverse, through_softmax(h, q)


@divergence("adaptive_kl", closed_form=adaptive_kl_gradient,
            alpha=Parameter(0.5, least=0, most=1, help="probability mass of the teacher's tail"))
def adaptive_kl(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w from where the two differ (Wu et al., AKL, COLING 2025).

    The teacher's probabilities are sorted ascending; the tail is where their cumulative sum is at most `alpha`,
    the head is the rest. With g = sum |p - q| over each part, w = g_head / (g_head + g_tail), detached; w = 1/2
    where p = q.
    """
    weight = adaptive_kl_weight(log_p, log_q, alpha)
    return weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


def todi_weight(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """w = sigmoid(beta (log p - log q)), (N, V)."""
    return (log_p - log_q).mul_(beta).sigmoid_()


def todi_gradient(log_p: Tensor, log_q: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """With r = log p - log q, a = w p and b = (1 - w) q, h = b - a - b r.

    It holds three (N, V) tensors besides the arguments and works in place, for this is the hot path.
    """
    weight, ratio, q = todi_weight(log_p, log_q, beta=beta), log_p - log_q, log_q.exp()
    reverse = torch.addcmul(q, weight, q, value=-1)  # b
    mixed = weight.mul_(log_p.exp()).sub_(reverse)  # a - b
    value = torch.linalg.vecdot(mixed, ratio)
    return value, through_softmax(mixed.addcmul_(reverse, ratio).neg_(), q)


@divergence("ToDi", closed_form=todi_gradient, entry_weight=todi_weight,
            beta=Parameter(1.0, least=0, help="how sharply the sign of log p - log q decides between the two parts"))
def todi(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """Forward and reverse KL mixed for each vocabulary entry (Jung et al., ToDi, EMNLP 2025).

    sum [ w p (log p - log q) + (1 - w) q (log q - log p) ] with w = sigmoid(beta (log p - log q)), detached:
    entries that the student underrates are pulled up by the forward part, entries that it overrates are pushed
    down by the reverse part. beta = 0 is the even mixture of both.
    """
    weight = todi_weight(log_p, log_q.detach(), beta=beta)
    ratio = log_p - log_q
    return ((weight * log_p.exp() - (1 - weight) * log_q.exp()) * ratio).sum(-1)


def _log_ratio(log_q: Tensor, log_p: Tensor, mean: Tensor) -> Tensor:
    """log q - log p less its mean (N,), which is large where a student is sure of what its teacher rules out.

    Subtracted from log q - log p, it would leave only the digits that this large number has below zero.
    """
    return log_q - (log_p + mean[:, None])


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q), 0 < weight < 1: exactly log p where p = q, and free of overflow.

    It factors out the larger of the two.
    """
    ratio = log_p - log_q
    p_larger = ratio > 0
    smaller = torch.where(p_larger, ratio.new_full((), 1 - weight), ratio.new_full((), weight))
    return (torch.where(p_larger, log_p, log_q)
            + torch.log1p(smaller * torch.expm1(torch.where(p_larger, -ratio, ratio))))


def _log_mixture_over_larger(ratio: Tensor, weight: float) -> Tensor:
    """log(m / max(p, q)) for m = weight p + (1 - weight) q and ratio = log p/q; exactly 0 where that is 0.

    log p/m is min(ratio, 0) less this, log q/m is min(-ratio, 0) less this. `_log_mixture` is for autograd, and slower.
    """
    smaller = (ratio > 0).to(ratio.dtype).mul_(1 - 2 * weight).add_(weight)  # the weight of the smaller of the two
    return ratio.abs().neg_().expm1_().mul_(smaller).log1p_()


def logit(share: float) -> float:
    return math.log(share) - math.log1p(-share)
