"""What a divergence is: a pure function of two log-probabilities over one vocabulary, and what belongs to it.

To add one, write `name(log_p, log_q, *, parameters)` under `@divergence("name", parameter=Parameter(...))`: the command
line, the launchers, the chunked loss and the tests find it in the registry. Throughout,

    log_p: (N, V) log-probabilities of the teacher, constant; log_q: (N, V) of the student; every entry is finite.

A function returns (N,) values, in nats. Its gradient comes from autograd, or from a second function, the closed form,
that makes value and gradient together in fewer passes over the vocabulary. One that is `sampled` estimates by one token
of each row, its label, and gets `labels`, (N,) token ids, besides.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from todi.criterions.parameters import Parameter
from todi.criterions.schedules import Schedule, ScheduleKind
from todi.criterions.selection import Selection
from todi.errors import InputError
from todi.registry import Registry, did_you_mean

# What a logit of -inf becomes: small enough that its probability is exactly 0, finite so that 0 * log 0 is 0.
MASKED_LOGIT = -1e9
# Of q: an entry with more than this share has a gradient that is a difference of nearly equal numbers.
NEARLY_ALL = 0.99
# A masked entry has less log-probability than this, at any temperature below a thousand.
ABSENT = -1e6


@dataclass(frozen=True)
class Definition:
    """All that there is to a divergence before its parameters have values: one record a name.

    Its functions take (log_p, log_q) and by keyword every parameter that is not its schedule's, and every one that its
    schedule moves.

    Attributes:
        value: -> (N,) nats, differentiable in `log_q`.
        closed_form: -> value and (N, V) gradient, as `Divergence.value_and_gradient` returns them; None for autograd.
        entry_weight: -> (N, V) weight of the forward part; None for a divergence that does not mix per entry.
        parameters: by name, in the order of the documentation.
        help: the formula and its source, from the docstring of `value`.
        schedule: what moves some of the functions' parameters from step to step; None where nothing does.
        selection: which rows of a sample it is taken of in training; None for all.
        sampled: whether `value` and `closed_form` estimate by the `labels` (N,), which they then take by keyword; so a
            value may be below 0.
    """

    name: str
    value: Callable[..., Tensor]
    closed_form: Callable[..., tuple[Tensor, Tensor]] | None
    entry_weight: Callable[..., Tensor] | None
    parameters: Mapping[str, Parameter]
    help: str
    schedule: ScheduleKind | None = None
    selection: Selection | None = None
    sampled: bool = False

    @property
    def not_of_functions(self) -> set[str]:
        """Names of the parameters that its functions do not take."""
        return {name for part in (self.schedule, self.selection) if part is not None for name in part.parameters}


DIVERGENCES: Registry[Definition] = Registry("kd objective")


def divergence(name: str, /, *, closed_form: Callable[..., tuple[Tensor, Tensor]] | None = None,
               entry_weight: Callable[..., Tensor] | None = None, sampled: bool = False,
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
        labels = {"labels": "labels"} if sampled else {}
        for function, more in ((value, labels), (closed_form, labels), (entry_weight, {})):
            if function is not None:  # else it would fail in a run's first step
                inspect.signature(function).bind("log_p", "log_q", **more, **parameters)
        help = inspect.getdoc(value) or ""
        DIVERGENCES.add(name, Definition(name, value, closed_form, entry_weight, parameters, help, sampled=sampled))
        return value

    return register


@dataclass(frozen=True)
class Divergence:
    """A divergence whose parameters have values, as `build_divergence` makes it.

    Attributes:
        params: by name, as they were given or by default.
        moved: what its schedule makes of those that it moves; at first what the schedule begins with.
    """

    definition: Definition
    params: dict[str, float]
    moved: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def arguments(self) -> dict[str, float]:
        """What its functions take besides log-probabilities."""
        return {name: value for name, value in self.numbers.items() if name not in self.definition.not_of_functions}

    @property
    def numbers(self) -> dict[str, float]:
        """All its parameters as they are at this step, whoever takes them."""
        return {**self.params, **self.moved}

    def schedule(self, total_steps: int) -> Schedule | None:
        """What moves its parameters over so many optimizer steps, at the first of them; None where nothing does."""
        kind = self.definition.schedule
        return None if kind is None else kind.make(self.params, total_steps)

    def at(self, moved: Mapping[str, float]) -> "Divergence":
        """The same where its schedule has these values."""
        return replace(self, moved=moved)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0,
                 labels: Tensor | None = None) -> Tensor:
        """The divergence of each row.

        Entries of -inf in either model lie outside the common vocabulary and carry no probability in both.

        Args:
            student_logits: (N, V), differentiable.
            teacher_logits: (N, V), constant.
            temperature: divides both.
            labels: (N,) token ids, for a divergence that is sampled.

        Returns:
            (N,) values >= 0 (of any sign where it is sampled), float32 (float64 for float64 logits).

        Raises:
            ValueError: it is sampled, and there are no labels.
        """
        return self.value(*log_probabilities(student_logits, teacher_logits, temperature), labels)

    def value(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None = None) -> Tensor:
        """(N, V), (N, V) -> (N,), differentiable in `log_q`. Raises InputError for a definition that returns else."""
        value = self.definition.value(log_p, log_q, **self._arguments(labels))
        if value.shape != log_q.shape[:-1]:
            raise InputError(f"the divergence {self.name} returned shape {tuple(value.shape)} for {len(log_q)} rows; "
                             "expected a value for each row, (N,), and no mean")
        return self._rounded(value)

    def entry_weight(self, log_p: Tensor, log_q: Tensor) -> Tensor | None:
        """The (N, V) weight of the forward part, for a divergence that mixes per entry; else None."""
        entry_weight = self.definition.entry_weight
        return None if entry_weight is None else entry_weight(log_p, log_q, **self.arguments)

    def value_and_gradient(self, log_p: Tensor, log_q: Tensor,
                           labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The value (N,) and its gradient (N, V) with respect to the logits, over temperature, behind `log_q`."""
        if self.definition.closed_form is None:
            value, gradient = self.value_and_autograd(log_p, log_q, labels)
        else:
            value, gradient = self.definition.closed_form(log_p, log_q, **self._arguments(labels))
        return self._rounded(value), _top_from_the_others(gradient, log_q)

    def value_and_autograd(self, log_p: Tensor, log_q: Tensor,
                           labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same as `value_and_gradient`, always by autograd, which loses digits where a row is peaked."""
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            value = self.value(log_p, leaf, labels)
            gradient, = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), through_softmax(gradient, log_q.exp())

    def _arguments(self, labels: Tensor | None) -> dict[str, Any]:
        if not self.definition.sampled:
            return self.arguments
        if labels is None:
            raise ValueError(f"{self.name} is an estimate by one token of each row: give labels, (N,) token ids")
        return {**self.arguments, "labels": labels}

    def _rounded(self, value: Tensor) -> Tensor:
        """Without rounding errors below 0, where nothing else can be there."""
        return value if self.definition.sampled else _not_negative(value)


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
    schedule = definition.schedule
    return Divergence(definition, values, {} if schedule is None else schedule.make(values, 1).values)


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


def through_softmax(gradient: Tensor, q: Tensor) -> Tensor:
    """From the gradient for log q, entries taken as independent, to that for the logits; in place."""
    return gradient.addcmul_(q, gradient.sum(-1, keepdim=True), value=-1)


def _top_from_the_others(gradient: Tensor, log_q: Tensor) -> Tensor:
    """Corrects the gradient (N, V) of an entry that has `NEARLY_ALL` of q; in place.

    The gradients of a row sum to zero. Those of the small entries have all their digits, so that their sum does.
    """
    most, top = log_q.max(-1, keepdim=True)
    own = gradient.gather(-1, top)
    others = gradient.scatter_(-1, top, 0).sum(-1, keepdim=True)
    return gradient.scatter_(-1, top, torch.where(most > math.log(NEARLY_ALL), -others, own))


def _not_negative(value: Tensor) -> Tensor:
    """Lifts a rounding error below zero to zero and leaves the gradient alone, which a clamp would drop."""
    return value + (value.detach().clamp_min(0) - value.detach())
