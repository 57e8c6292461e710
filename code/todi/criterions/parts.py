"""Objectives made of parts: divergences, each from a target of its own and with a weight for each row, and a schedule.

A target and a row weight are functions of the same two log-probabilities that a divergence takes. What they return is
constant: no gradient flows through it. So an objective of parts is one more divergence, whose gradient is made of those
of its divergences, and everything that takes a divergence takes it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from todi.criterions.definitions import DIVERGENCES, Definition, Divergence
from todi.criterions.parameters import Parameter
from todi.criterions.schedules import ScheduleKind
from todi.criterions.selection import Selection
from todi.registry import Registry


@dataclass(frozen=True, eq=False)
class Part:
    """What is made of a teacher and a student, as a constant.

    Attributes:
        function: of log_p and log_q (N, V) and its parameters; a target gives (N, V) log-probabilities, which the
            divergence takes in place of log_p, a row weight (N,) numbers of at least 0.
        help: the formula and its source, from the docstring of `function`.
    """

    function: Callable[..., Tensor]
    parameters: Mapping[str, Parameter]
    help: str

    @torch.no_grad()
    def __call__(self, log_p: Tensor, log_q: Tensor, arguments: Mapping[str, float]) -> Tensor:
        return self.function(log_p, log_q.detach(), **_own(self, arguments))


TARGETS: Registry[Part] = Registry("target")
ROW_WEIGHTS: Registry[Part] = Registry("row weight")


def target(name: str, /, **parameters: Parameter) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator that registers the function of a target. Raises ValueError where the name is taken."""
    return _registering(TARGETS, name, parameters)


def row_weight(name: str, /, **parameters: Parameter) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator that registers the function of a row weight. Raises ValueError where the name is taken."""
    return _registering(ROW_WEIGHTS, name, parameters)


def _registering(registry: Registry[Part], name: str,
                 parameters: Mapping[str, Parameter]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        inspect.signature(function).bind("log_p", "log_q", **parameters)  # else it would fail in a run's first step
        registry.add(name, Part(function, parameters, inspect.getdoc(function) or ""))
        return function

    return register


class Term:
    """One of the divergences that an objective is the sum of.

    Args:
        divergence: its name.
        target: name of what stands in for the teacher.
        weight: name of the row weight.

    Raises:
        ValueError: there is no such part, or the divergence has what an objective has once: a schedule, a selection.
    """

    def __init__(self, divergence: str, *, target: str | None = None, weight: str | None = None):
        self.divergence = DIVERGENCES[divergence]
        if self.divergence.not_of_functions:
            raise ValueError(f"{self.divergence.name} has a schedule or a selection and can be no part of an objective")
        self.target = None if target is None else TARGETS[target]
        self.weight = None if weight is None else ROW_WEIGHTS[weight]

    @property
    def parts(self) -> list[Definition | Part]:
        return [part for part in (self.divergence, self.target, self.weight) if part is not None]

    def value(self, log_p: Tensor, log_q: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """(N,), differentiable in `log_q`. Args: arguments: of all parts, and `labels` (N,) where one is sampled."""
        target, weight = self._constants(log_p, log_q, arguments)
        value = self._divergence(arguments).value(target, log_q, arguments.get("labels"))
        return value if weight is None else weight * value

    def value_and_gradient(self, log_p: Tensor, log_q: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(N,), and (N, V) for the logits behind `log_q`."""
        target, weight = self._constants(log_p, log_q, arguments)
        value, gradient = self._divergence(arguments).value_and_gradient(target, log_q, arguments.get("labels"))
        return (value, gradient) if weight is None else (weight * value, gradient.mul_(weight[:, None]))

    def _divergence(self, arguments: Mapping[str, float]) -> Divergence:
        return Divergence(self.divergence, _own(self.divergence, arguments))

    def _constants(self, log_p: Tensor, log_q: Tensor, arguments: Mapping[str, float]) -> tuple[Tensor, Tensor | None]:
        target = log_p if self.target is None else self.target(log_p, log_q, arguments)
        return target, None if self.weight is None else self.weight(log_p, log_q, arguments)


def objective(name: str, /, *terms: Term, help: str, schedule: ScheduleKind | None = None,
              selection: Selection | None = None, **parameters: Parameter) -> Definition:
    """Registers the sum of `terms` as a divergence called `name`.

    Its parameters are those of all parts, where one name is one number, less those that the schedule moves and with the
    schedule's and the selection's own; `parameters` have other defaults or ranges than there.

    Raises:
        ValueError: the name is taken, a parameter is no part's, or the schedule's name for one is a part's.
    """
    of_parts = {key: value for term in terms for part in term.parts for key, value in part.parameters.items()}
    moves, own = (schedule.moves, dict(schedule.parameters)) if schedule else ((), {})
    own |= selection.parameters if selection else {}
    unknown = (set(moves) | set(parameters)) - set(of_parts) - set(own)
    if unknown:
        raise ValueError(f"no part of the objective {name} has a parameter {', '.join(sorted(unknown))}; there are "
                         f"{', '.join([*of_parts, *own]) or 'none'}")
    if twice := set(own) & set(of_parts):
        raise ValueError(f"both a part and the schedule or the selection of the objective {name} have a parameter "
                         f"{', '.join(sorted(twice))}")
    declared = {key: value for key, value in (of_parts | own).items() if key not in moves} | parameters

    def value(log_p: Tensor, log_q: Tensor, **arguments: Any) -> Tensor:
        return sum(term.value(log_p, log_q, arguments) for term in terms)

    def closed_form(log_p: Tensor, log_q: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        values, gradients = zip(*(term.value_and_gradient(log_p, log_q, arguments) for term in terms), strict=True)
        return sum(values), sum(gradients)

    alone = len(terms) == 1 and len(terms[0].parts) == 1  # then what it mixes per entry is the divergence's
    entry_weight = terms[0].divergence.entry_weight if alone else None
    sampled = any(term.divergence.sampled for term in terms)
    return DIVERGENCES.add(name, Definition(name, value, closed_form, entry_weight, declared, help.strip(), schedule,
                                             selection, sampled))


def _own(part: Definition | Part, arguments: Mapping[str, float]) -> dict[str, float]:
    return {name: arguments[name] for name in part.parameters}
