"""What moves the parameters of an objective while a student learns.

A schedule is a state machine that is told once an optimizer step what the step gave, as means over all ranks. So its
values do not depend on how a step is cut, and its state, which a resume state keeps, is the same on every rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from todi.criterions.parameters import Parameter


class Schedule(Protocol):
    """The values of some parameters, step by step.

    Attributes:
        watches: whether it reads the means of a step, for which a device is waited for.
    """

    watches: bool

    @property
    def values(self) -> dict[str, float]:
        """Of the next step, by name."""

    def advance(self, means: Mapping[str, float] | None) -> None:
        """Goes on by an optimizer step.

        Args:
            means: of its sums per response token over all ranks; None where it does not watch, and of a step that the
                optimizer left out.
        """

    def state_dict(self) -> dict[str, float | None]: ...

    def load_state_dict(self, state: Mapping[str, float | None]) -> None: ...


@dataclass(frozen=True, eq=False)
class ScheduleKind:
    """A schedule before its parameters have values.

    Attributes:
        moves: names of the parameters that it gives values to.
        parameters: its own, by name.
        make: of the values of these, and of the optimizer steps in all.
    """

    moves: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    make: Callable[[Mapping[str, float], int], Schedule]


class _Fields:
    """A state that is all of the schedule's fields which `state` names."""

    state: tuple[str, ...] = ("step",)

    def state_dict(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class Linear(_Fields):
    """From `start` towards `end`, which the step after the last would have."""

    moved: str
    start: float
    end: float
    total_steps: int
    step: int = 0

    watches = False

    @property
    def values(self) -> dict[str, float]:
        return {self.moved: self.start + (self.end - self.start) * min(1.0, self.step / self.total_steps)}

    def advance(self, means: Mapping[str, float] | None) -> None:
        self.step += 1


def linear_schedule(moved: str, start: Parameter, end: Parameter) -> ScheduleKind:
    """The kind that moves a parameter in equal steps; its own are called after that one."""
    first, last = f"{moved}_start", f"{moved}_end"
    return ScheduleKind((moved,), {first: start, last: end},
                        lambda params, total_steps: Linear(moved, params[first], params[last], total_steps))


@dataclass
class Interpolation(_Fields):
    """TAID's t: the faster the divergence falls, the faster it rises, and never more slowly than in equal steps.

    With J the mean divergence of a step and d = (J before - J) / J before, m is the running mean of d and t rises by
    rate sigmoid(m) (1 - t). The first step only sets J.
    """

    t_start: float
    t_end: float
    rate: float
    momentum: float
    total_steps: int
    step: int = 0
    t: float | None = None  # what the steps so far have made of t_start
    m: float = 0.0
    before: float | None = None

    watches = True
    state = ("step", "t", "m", "before")

    @property
    def values(self) -> dict[str, float]:
        return {"t": self.t_start if self.t is None else self.t}

    def advance(self, means: Mapping[str, float] | None) -> None:
        """See `Schedule`; a step that was left out moves t by the equal steps alone."""
        self.step += 1
        t, first = self.values["t"], self.before is None
        if means is not None:
            now = means["kd"]
            if not first:
                fall = (self.before - now) / (self.before + 1e-15)
                self.m = self.momentum * self.m + (1 - self.momentum) * fall
                t += self.rate * (1 - t) * (1 + math.tanh(self.m / 2)) / 2  # the sigmoid, which cannot overflow
            self.before = now
        if not first:
            least = self.t_start + (self.t_end - self.t_start) * self.step / self.total_steps
            t = min(self.t_end, max(least, t))
        self.t = t


INTERPOLATION = ScheduleKind(
    ("t",),
    {"t_start": Parameter(0.4, least=0, most=1, help="the teacher's share of the target at first; 0.2 for a small gap"),
     "t_end": Parameter(1.0, least=0, most=1, help="the most that it becomes"),
     "t_rate": Parameter(5e-4, least=0, help="how far it moves in a step at most"),
     "t_momentum": Parameter(0.99, least=0, below=1, help="momentum of the relative fall of the divergence")},
    lambda params, total_steps: Interpolation(
        *(params[name] for name in ("t_start", "t_end", "t_rate", "t_momentum")), total_steps))
