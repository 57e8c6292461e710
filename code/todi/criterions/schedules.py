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


@dataclass
class AdaptiveShare(_Fields):
    """AdaKD's share of the rows: it falls where the divergence has fallen, and rises where that has risen.

    It goes by the running mean of the divergence and what that was when the share moved last: below it by more than
    `tolerance` of it, the share becomes 1 - rate times what it was, above it by more, 1 + rate times.
    """

    start: float
    least: float
    rate: float
    tolerance: float
    momentum: float
    first_steps: int  # of a run, through which the share stays
    step: int = 0
    share: float | None = None  # what the steps so far have made of `start`
    mean: float | None = None
    before: float | None = None

    watches = True
    state = ("step", "share", "mean", "before")

    @property
    def values(self) -> dict[str, float]:
        return {"share": self.start if self.share is None else self.share}

    def advance(self, means: Mapping[str, float] | None) -> None:
        """See `Schedule`; a step that was left out changes nothing but the number of steps."""
        self.step += 1
        if means is None:
            return
        now, share = means["kd"], self.values["share"]
        self.mean = now if self.mean is None else self.momentum * self.mean + (1 - self.momentum) * now
        if self.before is None:
            self.before = self.mean if self.step > self.first_steps else None
        elif self.mean > self.before * (1 + self.tolerance):
            self.share, self.before = min(1.0, share * (1 + self.rate)), self.mean
        elif self.mean < self.before * (1 - self.tolerance):
            self.share, self.before = max(self.least, share * (1 - self.rate)), self.mean


ADAPTIVE_SHARE = ScheduleKind(
    ("share",),
    {"share_start": Parameter(1.0, above=0, most=1, help="of a sample's rows, those that count at first"),
     "share_least": Parameter(0.1, above=0, most=1, help="the least that the share becomes"),
     "share_rate": Parameter(0.05, least=0, below=1, help="by how much of itself the share moves at a time"),
     "share_tolerance": Parameter(0.05, least=0, help="by how much of itself the divergence has to move for that"),
     "share_momentum": Parameter(0.99, least=0, below=1, help="momentum of the mean of the divergence"),
     "share_wait": Parameter(0.05, least=0, most=1, help="of the steps of a run, the first ones in which it stays")},
    lambda params, total_steps: AdaptiveShare(
        *(params[f"share_{name}"] for name in ("start", "least", "rate", "tolerance", "momentum")),
        math.floor(params["share_wait"] * total_steps)))


INTERPOLATION = ScheduleKind(
    ("t",),
    {"t_start": Parameter(0.4, least=0, most=1, help="the teacher's share of the target at first; 0.2 for a small gap"),
     "t_end": Parameter(1.0, least=0, most=1, help="the most that it becomes"),
     "t_rate": Parameter(5e-4, least=0, help="how far it moves in a step at most"),
     "t_momentum": Parameter(0.99, least=0, below=1, help="momentum of the relative fall of the divergence")},
    lambda params, total_steps: Interpolation(
        *(params[name] for name in ("t_start", "t_end", "t_rate", "t_momentum")), total_steps))
