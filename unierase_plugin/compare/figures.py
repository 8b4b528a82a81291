"""The numbers by which settings are chosen and methods are matched. They are pure functions of the tasks' figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..evaluation.metrics import harmonic_mean, mean

Figures = Mapping[str, float | None]

#: Metrics that are high while a fact is known.
LEFT = ("rougeL_recall", "prob", "extraction_strength")
#: Metrics of facts to keep.
KEPT = ("rougeL_recall", "prob")


def left(forget: Figures) -> float:
    """How much of the facts to forget is left: a mean of shares, in [0, 1]. It serves the choice of settings alone."""
    return mean(_known(forget, LEFT)) or 0.0


def retention(keep: Figures, before: Figures) -> float:
    """What is kept relative to before: the smaller of the ratios of ROUGE-L recall and of probability.

    It is the smaller one, since a method can keep what is said and lose what is likely, or the reverse.
    """
    ratios = [ratio for name in KEPT if (ratio := relative(keep.get(name), before.get(name))) is not None]
    return min(ratios) if ratios else 1.0


def relative(value: float | None, before: float | None) -> float | None:
    """`value` as a share of `before`; None if either is unknown or `before` is 0."""
    return value / before if value is not None and before else None


def retain_efficacy(keep: Figures) -> float | None:
    """The harmonic mean of ROUGE-L recall, probability and truth ratio on facts to keep, of those that are known."""
    known = _known(keep, (*KEPT, "truth_ratio"))
    return harmonic_mean(known) if known else None


def _known(figures: Figures, names: Sequence[str]) -> list[float]:
    return [value for name in names if (value := figures.get(name)) is not None]
