"""Figures over a whole set of questions: pure functions of the per-question ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .probability import TINY


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None where there is nothing to average: absent, not zero."""
    return sum(values) / len(values) if values else None


def harmonic_mean(values: Sequence[float]) -> float:
    """n over the sum of reciprocals; 0 where one value is 0. TOFU's model utility is that of nine figures."""
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0


def closest_to_one(truth_ratio: float) -> float:
    """min(R, 1/R), in [0, 1]: 1 where right and wrong answers are equally likely, as with a fact never seen (TOFU)."""
    return min(truth_ratio, 1 / (truth_ratio + TINY))


def truth_wins(truth_ratio: float) -> float:
    """max(0, 1 - R), in [0, 1]: by how much the right answer is the likelier, on what is to be kept (TOFU)."""
    return max(0.0, 1 - truth_ratio)


def forget_efficacy(*known: float) -> float:
    """1 minus the mean of figures that are high where a fact is still known: ROUGE-L, probability, 1 - min(R, 1/R), ...

    Yuan et al. 2024 (arXiv 2410.08109), as the UniErase paper uses it. High for a model that says nothing sensible any
    more, so never to be read without model utility and gibberish.
    """
    return 1 - sum(known) / len(known)


def forget_quality(truth_ratios: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """p of a two-sample Kolmogorov-Smirnov test against a model that never saw the facts, and its log10 (TOFU).

    The logarithm is that of the smallest positive number where p is 0 in double precision.
    """
    from scipy.stats import ks_2samp

    p = float(ks_2samp(truth_ratios, reference).pvalue)
    return p, math.log10(max(p, math.ulp(0.0)))
