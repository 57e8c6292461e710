"""How an optimizer step is cut over micro-batches and ranks."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from todi.data.tokenize import Example


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of one rank.

    Attributes:
        micro_batches: samples of each micro-batch; one may be empty.
        samples: how many the whole step has, over all ranks.
        tokens: response tokens of the whole step, over all micro-batches and ranks: what its loss is divided by.
        closes_round: the plan after it is made once the student has taken this step.
    """

    micro_batches: tuple[tuple[Example, ...], ...]
    samples: int
    tokens: int
    closes_round: bool = False


@dataclass(frozen=True)
class Cost:
    """What samples cost: floating-point operations, or any other unit.

    Attributes:
        token: for each token.
        row: for each labelled one.
        pair: for each pair of a token and one that it attends to.
    """

    token: int = 0
    row: int = 0
    pair: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.token + other.token, self.row + other.row, self.pair + other.pair)

    def of(self, examples: Sequence[Example]) -> int:
        """Of a batch of samples. The last token of a sample is only ever a label; a token attends to all before it."""
        lengths = [len(example.ids) - 1 for example in examples]
        rows = sum(example.response_tokens for example in examples)
        return (self.token * sum(lengths) + self.row * rows
                + self.pair * sum(length * (length + 1) // 2 for length in lengths))


@dataclass(frozen=True)
class StepShape:
    """How a step is cut, on every rank alike and without communication.

    Here its micro-batches have equal numbers of samples, of like length, for padding makes each as long as its longest.

    Attributes:
        batch_size: most samples of a micro-batch.
        accumulation: micro-batches of a step, on every rank, always.
        wanted: samples of a full step over all ranks, at most what its micro-batches hold, which it is by default.
    """

    batch_size: int
    accumulation: int
    rank: int = 0
    world: int = 1
    wanted: int | None = None

    @property
    def samples(self) -> int:
        """Of a full step, over all ranks."""
        return self.wanted or self.batch_size * self.accumulation * self.world

    def steps(self, samples: int) -> int:
        """That an epoch of `samples` has; the last takes what is left."""
        return -(-samples // self.samples)

    def cut(self, examples: Sequence[Example]) -> StepPlan:
        """This rank's part of the step that trains on `examples`."""
        by_length = sorted(examples, key=lambda example: len(example.ids))
        parts = self.accumulation * self.world
        cuts = [len(examples) * part // parts for part in range(parts + 1)]
        mine = range(self.rank, parts, self.world)
        return StepPlan(
            micro_batches=tuple(tuple(by_length[cuts[part]:cuts[part + 1]]) for part in mine),
            samples=len(examples),
            tokens=sum(example.response_tokens for example in examples))


@dataclass(frozen=True)
class PackedShape(StepShape):
    """A step whose micro-batches have no padding: every rank has the same cost, in as few of them as hold the tokens.

    Attributes:
        max_tokens: most tokens of a micro-batch; a longer sample has one to itself.
        cost: that the ranks share evenly.
    """

    max_tokens: int = 2048
    cost: Cost = Cost(token=1)

    def cut(self, examples: Sequence[Example]) -> StepPlan:
        """This rank's part of the step that trains on `examples`; each rank has as many micro-batches."""
        costs = [self.cost.of([example]) for example in examples]
        ranks = [[examples[i] for i in share] for share in balanced(costs, self.world)]
        parts = max(1, *(-(-_tokens(share, self.max_tokens) // self.max_tokens) for share in ranks))
        while not all(self._fit(micro) for share in ranks for micro in _micro_batches(share, parts)):
            parts += 1
        return StepPlan(
            micro_batches=tuple(_micro_batches(ranks[self.rank], parts)),
            samples=len(examples),
            tokens=sum(example.response_tokens for example in examples))

    def _fit(self, examples: Sequence[Example]) -> bool:
        return len(examples) < 2 or _tokens(examples) <= self.max_tokens


def balanced(costs: Sequence[int], shares: int) -> list[list[int]]:
    """Numbers 0 to len(costs) - 1 in `shares` of nearly equal cost: the dearest first, each to the cheapest share yet
    (Graham, 1969, longest processing time)."""
    heap = [(0, share) for share in range(shares)]
    found: list[list[int]] = [[] for _ in heap]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        cost, share = heap[0]
        found[share].append(number)
        heapq.heapreplace(heap, (cost + costs[number], share))
    return found


def _micro_batches(examples: Sequence[Example], parts: int) -> list[tuple[Example, ...]]:
    """`examples` in `parts` of nearly as many tokens; the largest first, as on every other rank."""
    shares = balanced([len(example.ids) - 1 for example in examples], parts)
    return sorted((tuple(examples[i] for i in share) for share in shares), key=_tokens, reverse=True)


def _tokens(examples: Sequence[Example], most: int = 2**62) -> int:
    """Of all examples, each with at most `most`."""
    return sum(min(len(example.ids) - 1, most) for example in examples)
