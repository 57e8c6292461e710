"""How much of its training text the student writes itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Mixture(Protocol):
    """Says how many samples of the next round are the student's. Every rank has one, and tells it the same."""

    def shares(self, progress: float) -> tuple[float, float]:
        """Of all samples the share that has a response of the student's; of these the share that it wrote before.

        Args:
            progress: of the run, 0 to 1.
        """

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Hears what `SampleSource.observe` hears."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class FixedMixture:
    """The same shares throughout: GKD's lambda (arXiv 2306.13649, algorithm 1), and some of its text again."""

    student: float
    replayed: float = 0.0

    def shares(self, progress: float) -> tuple[float, float]:
        return self.student, self.replayed

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Nothing here adapts."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take up."""


@dataclass
class AdaptiveMixture:
    """DistiLLM's adaptive off-policy approach (arXiv 2402.03898, section 3.2).

    The student's share rises by a tenth whenever the loss on dev has risen by a tenth of a nat over what it was when
    the share last rose (at first: over that of the first evaluation). Of its text more and more is replayed, by the
    progress of the run. Shares are of all ranks' samples; in the published code each rank draws for itself.

    Attributes:
        student: the share.
        before: the dev loss that the next is compared with; None before the first evaluation.
    """

    student: float = 0.0
    before: float | None = None

    _STEP = 0.1

    def shares(self, progress: float) -> tuple[float, float]:
        return self.student, progress

    def observe(self, metrics: Mapping[str, float]) -> None:
        loss = metrics.get("dev/loss")
        if loss is None:
            return
        if self.before is None:
            self.before = loss
        elif loss >= self.before + self._STEP:
            self.student, self.before = min(1.0, self.student + self._STEP), loss

    def state_dict(self) -> dict[str, Any]:
        return {"student": self.student, "before": self.before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.student, self.before = state["student"], state["before"]
