"""The audit's estimators: intervals, leak@k, AUC, extraction strength. They are pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

#: Two-sided 95 % point of the normal distribution.
Z95 = 1.959963984540054
BOOTSTRAP_DRAWS = 2000

Interval = tuple[float, float]


def wilson(hits: float, n: int) -> Interval:
    """95 % score interval of a share (Wilson 1927); (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """95 % percentile interval of a mean over resampled items. One item gives an interval without width."""
    if len(values) < 2:  # scipy resamples no single item
        return (values[0], values[0])
    drawn = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=BOOTSTRAP_DRAWS,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of shares in [0, 1].

    It is Wilson's, joined with the bootstrap's if some values are fractions. A bootstrap alone has no width if all
    values are equal. Wilson's is too wide for fractions, which vary less than zeros and ones: it claims less.
    """
    low, high = wilson(sum(values), len(values))
    if not values or all(value in (0.0, 1.0) for value in values):
        return low, high
    drawn = bootstrap(values)
    return min(low, drawn[0]), max(high, drawn[1])


def difference(share: float, own: Interval, control: float, others: Interval) -> Interval:
    """95 % interval of share - control from the two intervals (Newcombe 1998, method 10)."""
    middle = share - control
    return (
        middle - math.hypot(share - own[0], others[1] - control),
        middle + math.hypot(own[1] - share, control - others[0]),
    )


def leak_at_k(n: int, hits: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k answers is right, from n answers with `hits` right ones.

    It is 1 - C(n - hits, k) / C(n, k) (Chen et al. 2021, equation 1). Raises ValueError if k > n.
    """
    if not 0 <= hits <= n or not 1 <= k <= n:
        raise ValueError(f"leak@{k} of {hits} hits among {n} samples")
    return 1.0 - math.comb(n - hits, k) / math.comb(n, k)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a positive scores above a negative, with ties as one half; 0.5 if one of the lists is empty."""
    if not positive or not negative:
        return 0.5
    return float(scipy.stats.mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))


def extraction_strength(wanted: Sequence[int], predicted: Sequence[int]) -> float:
    """1 - k / T for the shortest prefix of k tokens after which all others are predicted (Carlini et al. 2021).

    predicted: the likeliest token at each position, given everything before it. In [0, 1]; 0 if the last one is wrong.
    """
    right = 0
    for token, guess in zip(reversed(wanted), reversed(predicted), strict=True):
        if token != guess:
            break
        right += 1
    return right / len(wanted)


#: A block's states count as holding knowledge if they cost more log-probability than this, in nats (Lee et al. 2026).
LEAST_LOSS = 0.05


def depth_score(baseline: Sequence[float], losses: Sequence[float]) -> float | None:
    """Unlearning Depth Score of one fact (Lee et al. 2026, equations 2, 4 and 5), in [0, 1].

    baseline, losses: log-probability that the answer loses by block, through the states of a model that never knew it,
    and through those of the model in question. None if no baseline exceeds LEAST_LOSS.
    """
    pairs = [(most, loss) for most, loss in zip(baseline, losses, strict=True) if most > LEAST_LOSS]
    if not pairs:
        return None
    return sum(min(max(loss, 0.0), most) for most, loss in pairs) / sum(most for most, _ in pairs)
