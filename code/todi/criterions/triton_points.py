"""The divergences in the fused kernel, entry by entry, beside `todi.criterions.divergences`.

A point function makes of log p, log q, p, q and a number of the row an entry's part of the value, and its
h = d value / d log q up to a multiple of q, which is free. To add one, write it and name it in `POINTS`.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from todi.criterions.divergences import SMALL_SHARE

_SMALL_SHARE = tl.constexpr(SMALL_SHARE)


@triton.jit
def forward_kl(log_p, log_q, p, q, parameter):
    return p * (log_p - log_q), -p


@triton.jit
def reverse_kl(log_p, log_q, p, q, parameter):
    value = q * (log_q - log_p)
    return value, value


@triton.jit
def adaptive_kl(log_p, log_q, p, q, parameter):
    forward, reverse = p * (log_p - log_q), q * (log_q - log_p)
    return parameter * forward + (1 - parameter) * reverse, (1 - parameter) * reverse - parameter * p


@triton.jit
def todi(log_p, log_q, p, q, parameter):
    ratio = log_p - log_q
    weight = tl.sigmoid(parameter * ratio)
    forward, reverse = weight * p, (1 - weight) * q
    return (forward - reverse) * ratio, reverse - forward - reverse * ratio


@triton.jit
def js_divergence(log_p, log_q, p, q, parameter):
    log_m = _log_mixture(log_p, log_q, 0.5)
    return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)), -0.5 * q * _softplus(log_p - log_q)


@triton.jit
def tvd(log_p, log_q, p, q, parameter):
    return 0.5 * tl.abs(p - q), tl.where(log_p > log_q, -q, 0.0)


@triton.jit
def skewed_forward_kl(log_p, log_q, p, q, parameter):
    share = tl.sigmoid(log_q - log_p - _logit(parameter))
    return p * (log_p - _log_mixture(log_p, log_q, parameter)), -p * share


@triton.jit
def skewed_reverse_kl(log_p, log_q, p, q, parameter):
    odds = log_p - log_q - _logit(parameter)
    share = tl.sigmoid(odds)
    series = -share * share * (0.5 + share * (1 / 3 + share / 4))
    h = q * tl.where(share < _SMALL_SHARE, series, share - _softplus(odds))
    return q * (log_q - _log_mixture(log_p, log_q, 1 - parameter)), h


@triton.jit
def _log_mixture(log_p, log_q, weight):
    """log(weight p + (1 - weight) q); exactly log p where p = q."""
    smaller = tl.where(log_p > log_q, 1 - weight, weight)
    return tl.maximum(log_p, log_q) + tl.log(1 + smaller * (tl.exp(-tl.abs(log_p - log_q)) - 1))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), all digits of it where x is far below zero."""
    small = tl.exp(-tl.abs(x))
    rounded = 1 + small
    log1p = tl.where(rounded == 1, small, tl.log(rounded) * (small / (rounded - 1)))  # W. Kahan's
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _logit(share):
    return tl.log(share) - tl.log(1 - share)


@dataclass(frozen=True)
class Point:
    """A divergence in the kernel.

    Attributes:
        function: value and h of an entry.
        parameter: the divergence's, by name; None without one.
        selects: whether the function's number is not the parameter but follows from it for each row.
    """

    function: triton.JITFunction
    parameter: str | None = None
    selects: bool = False


POINTS = {
    "forward_kl": Point(forward_kl),
    "reverse_kl": Point(reverse_kl),
    "js_divergence": Point(js_divergence),
    "tvd": Point(tvd),
    "skewed_forward_kl": Point(skewed_forward_kl, "skew_lambda"),
    "skewed_reverse_kl": Point(skewed_reverse_kl, "skew_lambda"),
    "adaptive_kl": Point(adaptive_kl, "alpha", selects=True),
    "ToDi": Point(todi, "beta"),
    "ToDi_scheduled": Point(todi, "beta"),
}
