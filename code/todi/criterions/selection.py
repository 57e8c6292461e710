"""Which rows of a sample a divergence is taken of, and at what temperature each, by a number that a row tells.

Some papers choose among the rows of a batch, by which they mean a micro-batch of one rank. Here it is among those of a
sample, which is never cut over micro-batches or ranks, so that neither changes what is kept. Rows of a whole step could
be chosen only after all of its micro-batches had been through both models, which would then have to run again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from todi.criterions.parameters import Parameter
from todi.criterions.row_statistics import entropy, hellinger


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows of each sample where a number is largest.

    Attributes:
        statistic: of log_q (n, V) -> (n,); of log_p and log_q, where it `compares` the two.
        parameters: of which `share` is that of a sample's rows that are kept, rounded up.
        temperatures: of the numbers (K,) of the kept rows, how many there are of each sample, and by keyword the
            parameters but for `share` -> factors (K,) of the rows' temperatures. None where all have the same.
    """

    statistic: Callable[..., Tensor]
    parameters: Mapping[str, Parameter]
    compares: bool = False
    temperatures: Callable[..., Tensor] | None = None


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


def cooler_where_larger(values: Tensor, counts: Sequence[int], *, temperature_range: float) -> Tensor:
    """exp(-c tanh log(value / median)) with the median of the kept rows of a sample, the lower one of two (AdaKD)."""
    values = values.clamp_min(torch.finfo(values.dtype).tiny)  # of rows where both models are equal
    medians = [part.median().expand(len(part)) for part in values.split(list(counts)) if len(part)]
    ratio = values / torch.cat([values[:0], *medians])
    return ratio.log_().tanh_().mul_(-temperature_range).exp_()


UNSUREST_STUDENT = Selection(entropy, {
    "share": Parameter(0.2, above=0, most=1, help="of a sample's rows, those where the student's entropy is largest")})

FURTHEST_APART = Selection(hellinger, {
    "share": Parameter(1.0, above=0, most=1, help="of a sample's rows, those that are furthest from the teacher's"),
    "temperature_range": Parameter(0.5, least=0, help="c, where rows have e^-c to e^c times the common temperature")},
    compares=True, temperatures=cooler_where_larger)
