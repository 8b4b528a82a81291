"""Figures of a whole set of questions, from the figures of each question. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .probability import TINY


def mean(values: Sequence[float]) -> float | None:
    """The mean. None for no values: the figure is absent, not zero."""
    return sum(values) / len(values) if values else None


def harmonic_mean(values: Sequence[float]) -> float:
    """n divided by the sum of reciprocals; 0 if one value is 0. TOFU's model utility is this mean of nine figures."""
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0


def closest_to_one(truth_ratio: float) -> float:
    """min(R, 1/R), in [0, 1]. 1 if right and wrong answers are equally likely, as for a fact never seen (TOFU)."""
    return min(truth_ratio, 1 / (truth_ratio + TINY))


def truth_wins(truth_ratio: float) -> float:
    """max(0, 1 - R), in [0, 1]: how much likelier the right answer is, on the retain set (TOFU)."""
    return max(0.0, 1 - truth_ratio)


def forget_efficacy(*known: float) -> float:
    """1 minus the mean of figures that are high for a known fact: ROUGE-L, probability, 1 - min(R, 1/R), ...

    Yuan et al. 2024 (arXiv 2410.08109); the UniErase paper uses it too. A model that says only nonsense scores high.
    Read it together with model utility and gibberish.
    """
    return 1 - sum(known) / len(known)


def forget_quality(truth_ratios: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """p of a two-sample Kolmogorov-Smirnov test against a model that never saw the facts, and log10 of p (TOFU).

    If p is 0 in double precision, the logarithm is that of the smallest positive number.
    """
    from scipy.stats import ks_2samp

    p = float(ks_2samp(truth_ratios, reference).pvalue)
    return p, math.log10(max(p, math.ulp(0.0)))
