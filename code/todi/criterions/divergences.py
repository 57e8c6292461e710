"""The divergences, each a pure function of two log-probabilities over one vocabulary.

To add one, write `name(log_p, log_q, *, parameters)` under `@divergence("name")`: the command line, the launchers,
the chunked loss and the tests find it in the registry. Throughout,

    log_p: (N, V) log-probabilities of the teacher, constant; log_q: (N, V) of the student; every entry is finite.

A function returns (N,) values, in nats. Its gradient comes from autograd, or from a second function under
`@closed_form("name")` that makes value and gradient together in fewer passes over the vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from todi.registry import Registry, did_you_mean

# What a logit of -inf becomes: small enough that its probability is exactly 0, finite so that 0 * log 0 is 0.
MASKED_LOGIT = -1e9

DIVERGENCES: "Registry[Callable[..., Tensor]]" = Registry("kd objective")
CLOSED_FORMS: "Registry[Callable[..., tuple[Tensor, Tensor]]]" = Registry("closed form")

ENTRY_WEIGHTS: "Registry[Callable[..., Tensor]]" = Registry("entry weight")

divergence = DIVERGENCES.register
closed_form = CLOSED_FORMS.register
entry_weight = ENTRY_WEIGHTS.register


@dataclass(frozen=True)
class Divergence:
    """A divergence with its parameters, as `build_divergence` makes it."""

    name: str
    params: dict[str, float]

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """The divergence of each row.

        Entries of -inf in either model lie outside the common vocabulary and carry no probability in both.

        Args:
            student_logits: (N, V), differentiable.
            teacher_logits: (N, V), constant.
            temperature: divides both.

        Returns:
            (N,) values >= 0, float32 (float64 for float64 logits).
        """
        return self.value(*log_probabilities(student_logits, teacher_logits, temperature))

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """(N, V), (N, V) -> (N,), differentiable in `log_q`."""
        return _not_negative(DIVERGENCES[self.name](log_p, log_q, **self.params))

    def entry_weight(self, log_p: Tensor, log_q: Tensor) -> Tensor | None:
        """The (N, V) weight of the forward part, for a divergence that mixes per entry; else None."""
        return ENTRY_WEIGHTS[self.name](log_p, log_q, **self.params) if self.name in ENTRY_WEIGHTS else None

    def value_and_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """The value (N,) and its gradient (N, V) with respect to the logits, over temperature, behind `log_q`."""
        if self.name in CLOSED_FORMS:
            value, gradient = CLOSED_FORMS[self.name](log_p, log_q, **self.params)
            return _not_negative(value), gradient
        return self.value_and_autograd(log_p, log_q)

    def value_and_autograd(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """The same as `value_and_gradient`, always by autograd."""
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            value = self.value(log_p, leaf)
            gradient, = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), _through_softmax(gradient, log_q.exp())


def build_divergence(name: str, **params: float) -> Divergence:
    """The divergence called `name` (any case), e.g. `build_divergence("ToDi", beta=1.0)`.

    Raises:
        ValueError: an unknown name, an unknown parameter, or a parameter out of its range; says what is allowed.
    """
    function = DIVERGENCES[name]
    name = DIVERGENCES.canonical(name)
    allowed = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for given in params:
        if given not in allowed:
            raise ValueError(f"{name} has no parameter {given!r}; {did_you_mean(given, allowed)}"
                             f"allowed: {', '.join(allowed) or 'none'}")
    function(torch.zeros(1, 1), torch.zeros(1, 1), **params)  # a parameter out of range fails here, not in a step
    return Divergence(name, params)


def log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p of the teacher, detached, and log q of the student, both (N, V), finite and over the common vocabulary."""
    dtype = compute_dtype(student_logits)
    masked = student_logits.isneginf() | teacher_logits.isneginf()
    log_p, log_q = (torch.log_softmax(logits.to(dtype).masked_fill(masked, MASKED_LOGIT) / temperature, -1)
                    for logits in (teacher_logits.detach(), student_logits))
    return log_p, log_q


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of everything behind the logits: float32, or float64 when `tensor` has it."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@divergence("forward_kl")
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) (Hinton et al., 2015)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@closed_form("forward_kl")
def forward_kl_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz = q - p."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp().sub_(p)


@divergence("reverse_kl")
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p) (Gu et al., MiniLLM, ICLR 2024)."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@closed_form("reverse_kl")
def reverse_kl_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz = q (log q - log p - KL(q || p))."""
    q, ratio = log_q.exp(), log_q - log_p
    value = (q * ratio).sum(-1)
    return value, ratio.sub_(value[:, None]).mul_(q)


@divergence("js_divergence")
def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 (Lin, 1991)."""
    log_m = _log_mixture(log_p, log_q, 0.5)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


@divergence("tvd")
def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation distance, sum |p - q| / 2 (Wen et al., f-DISTILL, ACL 2023)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


@divergence("skewed_forward_kl")
def skewed_forward_kl(log_p: Tensor, log_q: Tensor, *, skew_lambda: float = 0.1) -> Tensor:
    """KL(p || lambda p + (1 - lambda) q), 1e-6 <= lambda <= 1 - 1e-6 (Ko et al., DistiLLM, ICML 2024)."""
    _check_skew(skew_lambda)
    return (log_p.exp() * (log_p - _log_mixture(log_p, log_q, skew_lambda))).sum(-1)


@divergence("skewed_reverse_kl")
def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, *, skew_lambda: float = 0.1) -> Tensor:
    """KL(q || (1 - lambda) p + lambda q), 1e-6 <= lambda <= 1 - 1e-6 (Ko et al., DistiLLM, ICML 2024)."""
    _check_skew(skew_lambda)
    return (log_q.exp() * (log_q - _log_mixture(log_p, log_q, 1 - skew_lambda))).sum(-1)


@divergence("adaptive_kl")
def adaptive_kl(log_p: Tensor, log_q: Tensor, *, alpha: float = 0.5) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w from where the two differ (Wu et al., AKL, COLING 2025).

    The teacher's probabilities are sorted ascending; the tail is where their cumulative sum is at most `alpha`
    in [0, 1], the head is the rest. With g = sum |p - q| over each part, w = g_head / (g_head + g_tail),
    detached; w = 1/2 where p = q.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    with torch.no_grad():
        p, order = log_p.exp().sort(-1)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        head = (gap * (p.cumsum(-1) > alpha)).sum(-1)
        total = gap.sum(-1)
        weight = torch.where(total > 0, head / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)
    return weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


@divergence("ToDi")
def todi(log_p: Tensor, log_q: Tensor, *, beta: float = 1.0) -> Tensor:
    """Forward and reverse KL mixed for each vocabulary entry (Jung et al., ToDi, EMNLP 2025).

    sum [ w p (log p - log q) + (1 - w) q (log q - log p) ] with w = sigmoid(beta (log p - log q)), detached,
    beta >= 0: entries that the student underrates are pulled up by the forward part, entries that it overrates
    are pushed down by the reverse part. beta = 0 is the even mixture of both.
    """
    weight = todi_weight(log_p, log_q.detach(), beta=beta)
    ratio = log_p - log_q
    return ((weight * log_p.exp() - (1 - weight) * log_q.exp()) * ratio).sum(-1)


@entry_weight("ToDi")
def todi_weight(log_p: Tensor, log_q: Tensor, *, beta: float = 1.0) -> Tensor:
    """w = sigmoid(beta (log p - log q)), (N, V)."""
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be at least 0 and finite, got {beta}")
    return (log_p - log_q).mul_(beta).sigmoid_()


@closed_form("ToDi")
def todi_gradient(log_p: Tensor, log_q: Tensor, *, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """With r = log p - log q, a = w p and b = (1 - w) q the gradient for log q is b - a - b r.

    It holds three (N, V) tensors besides the arguments and works in place, for this is the hot path.
    """
    weight, ratio, q = todi_weight(log_p, log_q, beta=beta), log_p - log_q, log_q.exp()
    reverse = torch.addcmul(q, weight, q, value=-1)  # b
    mixed = weight.mul_(log_p.exp()).sub_(reverse)  # a - b
    value = torch.linalg.vecdot(mixed, ratio)
    return value, _through_softmax(mixed.addcmul_(reverse, ratio).neg_(), q)


def _through_softmax(gradient: Tensor, q: Tensor) -> Tensor:
    """From the gradient for log q, entries taken as independent, to that for the logits; in place."""
    return gradient.addcmul_(q, gradient.sum(-1, keepdim=True), value=-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q), 0 < weight < 1: exactly log p where p = q, and free of overflow.

    It factors out the larger of the two. The clamps keep the branch that `where` discards finite, without which
    its gradient would be 0 * inf.
    """
    ratio = log_p - log_q
    p_larger = log_p + torch.log1p((1 - weight) * torch.expm1(-ratio.clamp(min=0)))
    q_larger = log_q + torch.log1p(weight * torch.expm1(ratio.clamp(max=0)))
    return torch.where(ratio > 0, p_larger, q_larger)


def _not_negative(value: Tensor) -> Tensor:
    """Lifts a rounding error below zero to zero and leaves the gradient alone, which a clamp would drop."""
    return value + (value.detach().clamp_min(0) - value.detach())


def _check_skew(skew_lambda: float) -> None:
    if not 1e-6 <= skew_lambda <= 1 - 1e-6:  # closer to 0 or 1, float32 takes the mixture for one of its sides
        raise ValueError(f"skew_lambda must be within 1e-6 and 1 - 1e-6, got {skew_lambda}")

