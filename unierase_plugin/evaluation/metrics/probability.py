"""Metrics of what a model holds likely: pure functions of log-likelihoods in nats and of per-token matches.

Definitions are those of TOFU (Maini et al. 2024, arXiv 2401.06121, section 2.2) as open-unlearning (Dorna et al. 2025,
arXiv 2506.12618) computes them today, its guard against division by zero included, so that figures can be put beside
published ones. docs/reference/tasks.md says where TOFU's own code differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Added to denominators, as open-unlearning does: it decides where a model gives an answer less than about 1e-8.
TINY = 1e-10

TRUTH_RATIOS = ("geometric", "arithmetic")


def answer_probability(loglikelihood: float, tokens: int) -> float:
    """P(a|q)^(1/|a|): the geometric mean of the answer's token probabilities. Nats, summed over `tokens` tokens."""
    return math.exp(loglikelihood / tokens)


def probability_among(right: float, wrong: Sequence[float]) -> float:
    """A right answer's share of the normalised probabilities of all options, for questions that come with options."""
    return right / (right + sum(wrong) + TINY)


def truth_ratio(right: float, wrong: Sequence[float], variant: str = "geometric") -> float:
    """How likely wrong answers are for each unit of the right one: below 1 where the model knows better.

    right, wrong: normalised probabilities of the paraphrased right answer and of wrong ones of the same form.
    "geometric" averages the wrong ones by their logarithms, as TOFU's aggregation script and open-unlearning do;
    "arithmetic" as TOFU's paper (equation 1) and the utility code that it ships do.
    """
    arithmetic = variant == "arithmetic"
    average = sum(wrong) / len(wrong) if arithmetic else math.exp(sum(map(_log, wrong)) / len(wrong))
    return average / (right + TINY)


def _log(probability: float) -> float:
    return math.log(probability) if probability else -math.inf


def exact_memorization(matches: Sequence[bool]) -> float:
    """Share of an answer's tokens that are the most likely one after the question and the true tokens before them.

    Tirumala et al. 2022 (arXiv 2205.10770), as open-unlearning computes it.
    """
    return sum(matches) / len(matches)


def extraction_strength(matches: Sequence[bool]) -> float:
    """Share of an answer that greedy decoding gives once the rest before it is given, in (0, 1].

    1 - k / n, with k the first token from which on all n match. Carlini et al. 2021 (arXiv 2012.07805). As in
    open-unlearning k ends at n - 1: an answer whose last token does not match scores 1 / n, not 0.
    """
    ending = 0
    while ending < len(matches) and matches[-1 - ending]:
        ending += 1
    return max(ending, 1) / len(matches)
