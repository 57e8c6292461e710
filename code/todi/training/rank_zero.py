"""What the first rank does that the others do not, in bytes, and how that grows with their number."""

from collections.abc import Sequence
from dataclasses import dataclass

from todi.training.memory import Shape, training_state

_ENTRY = 100  # bytes of state.json for each file of a state, and of what ranks gather of one another: estimated
_SCORE = 9  # bytes of a number that ranks gather
_READING = 1.5e9  # bytes a second that checksums take, as training/train_inputs.py says


@dataclass(frozen=True)
class Duty:
    """Of the first rank.

    Attributes:
        when: at the start, for a state, for a checkpoint or at an evaluation.
        what: it does, in words.
        bytes: that it reads, writes or receives.
        seconds: that it takes; 0 where it is next to nothing.
        grows: whether there is more of it with more ranks.
    """

    when: str
    what: str
    bytes: int
    seconds: float
    grows: bool = False


def duties(shape: Shape, teachers: Sequence[int], *, stage: int, ranks: int, dev_responses: int,
           disk: float) -> list[Duty]:
    """What the first rank does alone.

    Args:
        teachers: bytes of each teacher's weights on disk.
        dev_responses: which each rank writes and scores a share of.
        disk: bytes a second that a process writes.
    """
    weights = shape.parameters * shape.width
    saved = (shape.parameters if shape.trained == shape.parameters else shape.trained) * shape.width
    # under stage 3 DeepSpeed writes no weights besides the optimizer's fp32 masters
    own = training_state(shape, stage, ranks).optimizer + (0 if stage == 3 else shape.trained * shape.width)
    read = weights + sum(teachers)
    files = ranks * (1 + (stage > 0) + (stage == 3)) + (stage < 3)
    return [
        Duty("start", "checksums of the models; less where nodes share the files", read, read / _READING),
        Duty("start", "what differs on each rank", ranks * _ENTRY, 0.0, grows=True),
        Duty("state", "its own part; at stages 0 to 2 also the trained weights", own, own / disk),
        Duty("state", "the list of all files", files * _ENTRY, 0.0, grows=True),
        Duty("checkpoint", "the trained model, gathered in its memory and written", saved, saved / disk),
        Duty("evaluation", "the scores of all responses", dev_responses * _SCORE, 0.0),
        Duty("evaluation", "an envelope of each rank's", ranks * _ENTRY, 0.0, grows=True),
    ]
