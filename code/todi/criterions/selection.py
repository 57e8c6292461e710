"""Which rows of a sample a divergence is taken of, by a number that the student's own distribution tells.

A sample is never cut over micro-batches or ranks, so that neither changes what is kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from todi.criterions.parameters import Parameter


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows of each sample where a number is largest.

    Attributes:
        statistic: of log_q (n, V) -> (n,).
        parameters: of which `share` is that of a sample's rows that are kept, rounded up.
    """

    statistic: Callable[[Tensor], Tensor]
    parameters: Mapping[str, Parameter]


def entropy(log_q: Tensor) -> Tensor:
    """(n, V) -> (n,), in nats."""
    return -torch.linalg.vecdot(log_q.exp(), log_q)


def largest_of_each(values: Tensor, counts: Sequence[int], share: float) -> Tensor:
    """Of each sample the rows with the largest of `values` (N,), a share of them rounded up; (K,), in their order.

    Nothing is asked of the device: how many are kept follows from `counts`, the rows of each sample, which follow one
    another. Of equal ones the first are kept.
    """
    samples = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
    order = values.argsort(descending=True, stable=True)
    order = order[samples.to(values.device)[order].argsort(stable=True)]  # sample by sample, the largest first
    first, places = 0, [torch.arange(0)]
    for count in counts:
        places.append(torch.arange(first, first + kept_of(count, share)))
        first += count
    return order[torch.cat(places).to(values.device)].sort().values


def kept_of(count: int, share: float) -> int:
    """How many of a sample's rows are kept."""
    return min(count, math.ceil(share * count - 1e-9))


UNSUREST_STUDENT = Selection(entropy, {
    "share": Parameter(0.2, above=0, most=1, help="of a sample's rows, those where the student's entropy is largest")})
