"""Metrics of how likely a model finds an answer: pure functions of log-likelihoods (nats) and of token matches.

The definitions are those of TOFU (Maini et al. 2024, arXiv 2401.06121, section 2.2), computed as open-unlearning (Dorna
et al. 2025, arXiv 2506.12618) does today, with its guard against division by zero. So the figures compare with
published ones. docs/reference/tasks.md lists where TOFU's own code differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Added to denominators, as in open-unlearning. It matters for answers with a probability below about 1e-8.
TINY = 1e-10

TRUTH_RATIOS = ("geometric", "arithmetic")


def answer_probability(loglikelihood: float, tokens: int) -> float:
    """P(a|q)^(1/|a|): the geometric mean of the answer's token probabilities.

    loglikelihood: in nats, summed over the answer's `tokens` tokens.
    """
    return math.exp(loglikelihood / tokens)


def probability_among(right: float, wrong: Sequence[float]) -> float:
    """The right answer's share of the normalised probabilities of all options, for multiple-choice questions."""
    return right / (right + sum(wrong) + TINY)


def truth_ratio(right: float, wrong: Sequence[float], variant: str = "geometric") -> float:
    """How likely the wrong answers are compared with the right one. Below 1, the model prefers the right one.

    right, wrong: normalised probabilities of the paraphrased right answer and of wrong answers of the same form.
    "geometric" averages the logarithms of the wrong ones, as TOFU's aggregation script and open-unlearning do.
    "arithmetic" averages the probabilities, as TOFU's paper (equation 1) and its utility code do.
    """
    arithmetic = variant == "arithmetic"
    average = sum(wrong) / len(wrong) if arithmetic else math.exp(sum(map(_log, wrong)) / len(wrong))
    return average / (right + TINY)


def _log(probability: float) -> float:
    return math.log(probability) if probability else -math.inf


def exact_memorization(matches: Sequence[bool]) -> float:
    """Share of the answer's tokens that the model ranks first, given the question and the true tokens before.

    Tirumala et al. 2022 (arXiv 2205.10770), computed as in open-unlearning.
    """
    return sum(matches) / len(matches)


def extraction_strength(matches: Sequence[bool]) -> float:
    """Share of the answer that greedy decoding completes once the rest before it is given, in (0, 1].

    1 - k / n, where all n tokens match from token k on. Carlini et al. 2021 (arXiv 2012.07805). As in open-unlearning,
    k is at most n - 1: an answer whose last token does not match scores 1 / n, not 0.
    """
    ending = 0
    while ending < len(matches) and matches[-1 - ending]:
        ending += 1
    return max(ending, 1) / len(matches)
