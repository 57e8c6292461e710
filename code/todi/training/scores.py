"""How good a model is on dev, and which of several is the best. Imports nothing heavy: the launchers ask too."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Score:
    """How good a model is on dev: by ROUGE-L where it was generated, else by loss.

    Attributes:
        loss: nats per response token.
        rouge_l: 0 to 100, or None.
        accuracy: share of the response tokens that were its first choice; ranks nothing.
    """

    loss: float
    rouge_l: float | None = None
    accuracy: float | None = None

    @property
    def rank(self) -> float:
        """Larger is better; what is not a number is worst."""
        return _or_worst(-self.loss if self.rouge_l is None else self.rouge_l)

    @property
    def metrics(self) -> dict[str, float]:
        """What there is, by the name that a reader knows."""
        return {"loss": self.loss} | ({} if self.rouge_l is None else {"ROUGE-L": self.rouge_l})

    def folder_name(self, epoch: int, step: int) -> str:
        """The published form, epochA_stepB_lossX_rougelY."""
        rouge = "" if self.rouge_l is None else f"_rougel{self.rouge_l:.4f}"
        return f"epoch{epoch}_step{step}_loss{self.loss:.4f}{rouge}"


_NUMBER = r"-?\d+\.?\d*|-?inf|nan"
_FOLDER_NAME = re.compile(rf"epoch\d+_step(?P<step>\d+)_loss(?P<loss>{_NUMBER})(_rougel(?P<rouge>{_NUMBER}))?")


class Kept(NamedTuple):
    """A checkpoint that is kept.

    Attributes:
        rank: of its score.
        name: of its folder.
        loss: None where version 0.1 kept it; its name has a rounded one.
    """

    rank: float
    name: str
    loss: float | None = None

    @classmethod
    def named(cls, name: str) -> "Kept | None":
        """What the name of a checkpoint's folder says; None if it is none."""
        parts = _FOLDER_NAME.fullmatch(name)
        score = parts and Score(float(parts["loss"]), parts["rouge"] and float(parts["rouge"]))
        return score and cls(score.rank, name, score.loss)

    @property
    def order(self) -> tuple[float, float, int]:
        """Larger is better: the rank, of equal ones the lower loss, of equal ones the later step."""
        parts = _FOLDER_NAME.fullmatch(self.name)
        loss = float(parts["loss"]) if self.loss is None else self.loss
        return _or_worst(self.rank), _or_worst(-loss), int(parts["step"])

    def advantage_over(self, other: "Kept") -> str:
        """In what a better one is better."""
        (rank, loss, _), (other_rank, other_loss, _) = self.order, other.order
        if rank != other_rank:
            return "a better ROUGE-L" if _FOLDER_NAME.fullmatch(self.name)["rouge"] else "a better loss"
        return "the same ROUGE-L and a better loss" if loss != other_loss else "the same scores at a later step"


def _or_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value
