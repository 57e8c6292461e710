"""The divergences, each a pure function of two log-probabilities over one vocabulary, and what belongs to it.

To add one, write `name(log_p, log_q, *, parameters)` under `@divergence("name", parameter=Parameter(...))`: the command
line, the launchers, the chunked loss and the tests find it in the registry. Throughout,

    log_p: (N, V) log-probabilities of the teacher, constant; log_q: (N, V) of the student; every entry is finite.

A function returns (N,) values, in nats. Its gradient comes from autograd, or from a second function, the closed form,
that makes value and gradient together in fewer passes over the vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from todi.errors import InputError
from todi.registry import Registry, did_you_mean

# What a logit of -inf becomes: small enough that its probability is exactly 0, finite so that 0 * log 0 is 0.
MASKED_LOGIT = -1e9


@dataclass(frozen=True)
class Parameter:
    """A number that a divergence depends on, finite and within a range.

    Attributes:
        default: its value where none is given.
        help: what it is, in a few words.
        least, most: ends of the range that belong to it.
        above, below: ends of the range that do not.
        integer: whether it must be a whole number; the divergence then gets an int.
    """

    default: float
    _: KW_ONLY
    help: str
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    integer: bool = False

    @property
    def allowed(self) -> str:
        """The range in words, e.g. "at least 0 and finite"."""
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = [f"{word} {end}" for word, end in ends.items() if math.isfinite(end)]
        if self.integer:
            words.append("a whole number")
        elif len(words) < 2:
            words.append("finite")
        return " and ".join(words)

    def check(self, name: str, value: float) -> float:
        """`value` as the divergence gets it. Raises ValueError for one out of range, which it calls `name`."""
        inside = self.least <= value <= self.most and self.above < value < self.below  # inf and NaN never are
        if not inside or (self.integer and value != int(value)):
            raise ValueError(f"{name} must be {self.allowed}, got {value}")
        return int(value) if self.integer else float(value)


@dataclass(frozen=True)
class Definition:
    """All that there is to a divergence before its parameters have values: one record a name.

    Its functions take (log_p, log_q) and every parameter by keyword.

    Attributes:
        value: -> (N,) nats, differentiable in `log_q`.
        closed_form: -> value and (N, V) gradient, as `Divergence.value_and_gradient` returns them; None for autograd.
        entry_weight: -> (N, V) weight of the forward part; None for a divergence that does not mix per entry.
        parameters: by name, in the order of the documentation.
        help: the formula and its source, from the docstring of `value`.
    """

    name: str
    value: Callable[..., Tensor]
    closed_form: Callable[..., tuple[Tensor, Tensor]] | None
    entry_weight: Callable[..., Tensor] | None
    parameters: Mapping[str, Parameter]
    help: str


DIVERGENCES: Registry[Definition] = Registry("kd objective")


def divergence(name: str, /, *, closed_form: Callable[..., tuple[Tensor, Tensor]] | None = None,
               entry_weight: Callable[..., Tensor] | None = None,
               **parameters: Parameter) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator that registers a value function under `name`, with its companions and its parameters.

    Raises:
        ValueError: the name is taken.
        TypeError: one of the functions does not take these parameters, or one of these is no `Parameter`.
    """
    for parameter, declared in parameters.items():
        if not isinstance(declared, Parameter):
            raise TypeError(f"{parameter} of the divergence {name} must be a Parameter, got {declared!r}")

    def register(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for function in filter(None, (value, closed_form, entry_weight)):
            inspect.signature(function).bind("log_p", "log_q", **parameters)  # else it would fail in a run's first step
        help = inspect.getdoc(value) or ""
        DIVERGENCES.add(name, Definition(name, value, closed_form, entry_weight, parameters, help))
        return value

    return register


@dataclass(frozen=True)
class Divergence:
    """A divergence whose parameters have values, as `build_divergence` makes it."""

    definition: Definition
    params: dict[str, float]

    @property
    def name(self) -> str:
        return self.definition.name

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
        """(N, V), (N, V) -> (N,), differentiable in `log_q`. Raises InputError for a definition that returns else."""
        value = self.definition.value(log_p, log_q, **self.params)
        if value.shape != log_q.shape[:-1]:
            raise InputError(f"the divergence {self.name} returned shape {tuple(value.shape)} for {len(log_q)} rows; "
                             "expected a value for each row, (N,), and no mean")
        return _not_negative(value)

    def entry_weight(self, log_p: Tensor, log_q: Tensor) -> Tensor | None:
        """The (N, V) weight of the forward part, for a divergence that mixes per entry; else None."""
        entry_weight = self.definition.entry_weight
        return None if entry_weight is None else entry_weight(log_p, log_q, **self.params)

    def value_and_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """The value (N,) and its gradient (N, V) with respect to the logits, over temperature, behind `log_q`."""
        if self.definition.closed_form is None:
            return self.value_and_autograd(log_p, log_q)
        value, gradient = self.definition.closed_form(log_p, log_q, **self.params)
        return _not_negative(value), gradient

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
    definition = DIVERGENCES[name]
    allowed = definition.parameters
    for given in params:
        if given not in allowed:
            raise ValueError(f"{definition.name} has no parameter {given!r}; {did_you_mean(given, list(allowed))}"
                             f"allowed: {', '.join(allowed) or 'none'}")
    values = {key: parameter.check(key, params.get(key, parameter.default)) for key, parameter in allowed.items()}
    return Divergence(definition, values)


def markdown_table() -> str:
    """Every divergence with its formula and source, its parameters with their defaults and ranges, for the docs."""
    rows = [("`KD_OBJ`", "per-token value", "`KD_PARAMS`"), ("---",) * 3]
    for definition in (DIVERGENCES[name] for name in DIVERGENCES):
        parameters = [f"`{key}={parameter.default}`, {parameter.allowed}: {parameter.help}"
                      for key, parameter in definition.parameters.items()]
        rows.append((f"`{definition.name}`", definition.help.partition("\n\n")[0], "; ".join(parameters)))
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


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


def forward_kl_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz = q - p."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp().sub_(p)


@divergence("forward_kl", closed_form=forward_kl_gradient)
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) (Hinton et al., 2015)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl_gradient(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz = q (log q - log p - KL(q || p))."""
    q, ratio = log_q.exp(), log_q - log_p
    value = (q * ratio).sum(-1)
    return value, ratio.sub_(value[:, None]).mul_(q)


@divergence("reverse_kl", closed_form=reverse_kl_gradient)
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p) (Gu et al., MiniLLM, ICLR 2024)."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@divergence("js_divergence")
def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 (Lin, 1991)."""
    log_m = _log_mixture(log_p, log_q, 0.5)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


@divergence("tvd")
def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation distance, sum |p - q| / 2 (Wen et al., f-DISTILL, ACL 2023)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


# Closer to 0 or 1, float32 takes the mixture for one of its sides.
SKEW = Parameter(0.1, least=1e-6, most=1 - 1e-6, help="lambda, the share of the first distribution in the mixture")


@divergence("skewed_forward_kl", skew_lambda=SKEW)
def skewed_forward_kl(log_p: Tensor, log_q: Tensor, *, skew_lambda: float) -> Tensor:
    """KL(p || lambda p + (1 - lambda) q) (Ko et al., DistiLLM, ICML 2024)."""
    return (log_p.exp() * (log_p - _log_mixture(log_p, log_q, skew_lambda))).sum(-1)


@divergence("skewed_reverse_kl", skew_lambda=SKEW)
def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, *, skew_lambda: float) -> Tensor:
    """KL(q || (1 - lambda) p + lambda q) (Ko et al., DistiLLM, ICML 2024)."""
    return (log_q.exp() * (log_q - _log_mixture(log_p, log_q, 1 - skew_lambda))).sum(-1)


@divergence("adaptive_kl", alpha=Parameter(0.5, least=0, most=1, help="probability mass of the teacher's tail"))
def adaptive_kl(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w from where the two differ (Wu et al., AKL, COLING 2025).

    The teacher's probabilities are sorted ascending; the tail is where their cumulative sum is at most `alpha`,
    the head is the rest. With g = sum |p - q| over each part, w = g_head / (g_head + g_tail), detached; w = 1/2
    where p = q.
    """
    with torch.no_grad():
        p, order = log_p.exp().sort(-1)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        head = (gap * (p.cumsum(-1) > alpha)).sum(-1)
        total = gap.sum(-1)
        weight = torch.where(total > 0, head / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)
    return weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


def todi_weight(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """w = sigmoid(beta (log p - log q)), (N, V)."""
    return (log_p - log_q).mul_(beta).sigmoid_()


def todi_gradient(log_p: Tensor, log_q: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """With r = log p - log q, a = w p and b = (1 - w) q the gradient for log q is b - a - b r.

    It holds three (N, V) tensors besides the arguments and works in place, for this is the hot path.
    """
    weight, ratio, q = todi_weight(log_p, log_q, beta=beta), log_p - log_q, log_q.exp()
    reverse = torch.addcmul(q, weight, q, value=-1)  # b
    mixed = weight.mul_(log_p.exp()).sub_(reverse)  # a - b
    value = torch.linalg.vecdot(mixed, ratio)
    return value, _through_softmax(mixed.addcmul_(reverse, ratio).neg_(), q)


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
