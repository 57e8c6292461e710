"""How sure a mean score is: bootstrap over examples, whose seeds are averaged first."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_SEED = 0
_AT_ONCE = 250  # resamples in memory together

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A mean score less another one.

    Attributes:
        interval: 95 %, None where there are fewer than two examples.
        p_value: two-sided, of the difference being zero; None likewise.
    """

    mean: float
    interval: Interval | None
    p_value: float | None


def interval(samples: Sequence[np.ndarray]) -> Interval | None:
    """95 % bootstrap interval (percentiles) of the mean of the means of `samples`, each resampled by itself.

    Args:
        samples: scores (examples,) of each set.

    Returns:
        None where a set has a single example, which says nothing of others.
    """
    found = _bootstrap(samples)
    return None if found is None else tuple(map(float, found.confidence_interval))


def paired_difference(samples: Sequence[np.ndarray], baseline: Sequence[np.ndarray]) -> Difference:
    """The mean of the means of `samples` less that of `baseline`, by a paired bootstrap test (Koehn, 2004).

    Args:
        samples: scores (examples,) of each set.
        baseline: those of the same examples in the same order.

    Raises:
        ValueError: the two have other sets or examples.
    """
    differences = [ours - theirs for ours, theirs in zip(samples, baseline, strict=True)]
    mean = float(np.mean([values.mean() for values in differences]))
    found = _bootstrap(differences)
    if found is None:
        return Difference(mean, None, None)
    drawn = found.bootstrap_distribution
    # The observed difference counts as one of the draws, so that no p-value is zero.
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1
    return Difference(mean, tuple(map(float, found.confidence_interval)),
                      float(min(1.0, 2 * tail / (len(drawn) + 1))))


def _bootstrap(samples: Sequence[np.ndarray]) -> object | None:
    if min(map(len, samples)) < 2:
        return None
    from scipy import stats  # takes a second to import, which every start of a training would pay

    return stats.bootstrap(tuple(samples), _mean_of_means, vectorized=True, method="percentile", batch=_AT_ONCE,
                           n_resamples=_RESAMPLES, rng=np.random.default_rng(_SEED))


def _mean_of_means(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    return sum(sample.mean(axis) for sample in samples) / len(samples)
