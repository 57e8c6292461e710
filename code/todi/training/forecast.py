"""How long a run takes: operations over an assumed speed, and what the sending adds."""

from collections.abc import Sequence
from dataclasses import dataclass

from todi.training.traffic import Collective, Links


@dataclass(frozen=True)
class Pace:
    """What a machine does in a second.

    Attributes:
        peak: operations of one GPU, by its data sheet.
        mfu: share of it that the model's operations reach; assumed, or measured elsewhere.
        links: between the GPUs.
        host: bytes between a GPU and the computer's memory.
    """

    peak: float
    mfu: float
    links: Links
    host: float

    def computing(self, operations: float) -> float:
        """Seconds of so many operations over all ranks."""
        return operations / (self.links.ranks * self.peak * self.mfu)


@dataclass(frozen=True)
class Forecast:
    """Of a run, without what comes besides its steps (evaluation, checkpoints, the start).

    Attributes:
        operations: of a step, over all ranks.
        computing, exposed: seconds of a step: of its operations, and of sending that nothing hides.
    """

    steps: int
    operations: float
    computing: float
    exposed: float

    @property
    def hours(self) -> float:
        return self.steps * (self.computing + self.exposed) / 3600


def forecast(steps: int, operations: float, traffic: Sequence[Collective], to_host: int, pace: Pace) -> Forecast:
    """steps x (operations / (ranks x peak x MFU) + exposed communication).

    What is sent beside the computing costs what it takes longer than that; the rest, and what goes to the computer's
    memory, costs all of its time.

    Args:
        operations: of a step, over all ranks.
        to_host: bytes between a GPU and the computer's memory in a step.
    """
    computing = pace.computing(operations)
    beside, alone = (sum(pace.links.seconds(one.sent(pace.links.ranks)) for one in traffic if one.overlapped == hidden)
                     for hidden in (True, False))
    return Forecast(steps, operations, computing, max(0.0, beside - computing) + alone + to_host / pace.host)
