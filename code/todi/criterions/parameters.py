"""A number that an objective depends on: its default, its range, and what it is."""

import math
from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Parameter:
    """A number that a part of an objective depends on, finite and within a range.

    Attributes:
        default: its value where none is given.
        help: what it is, in a few words.
        least, most: ends of the range that belong to it.
        above, below: ends of the range that do not.
        integer: whether it must be a whole number; the part then gets an int.
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
        """`value` as the part gets it. Raises ValueError for one out of range, which it calls `name`."""
        inside = self.least <= value <= self.most and self.above < value < self.below  # inf and NaN never are
        if not inside or (self.integer and value != int(value)):
            raise ValueError(f"{name} must be {self.allowed}, got {value}")
        return int(value) if self.integer else float(value)
