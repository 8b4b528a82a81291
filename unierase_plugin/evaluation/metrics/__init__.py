"""Metrics of forgetting and keeping: pure functions of texts and numbers. They need no model, tokenizer or file."""

from .aggregates import closest_to_one, forget_efficacy, forget_quality, harmonic_mean, mean, truth_wins
from .probability import answer_probability, exact_memorization, extraction_strength, probability_among, truth_ratio
from .text import answered, is_fluent, is_garbled, reads_as_idk, rouge_l_recall, token_entropy
from .units import SHORT_ANSWER_WORDS, folded, is_short, unspaced_pairs, words

__all__ = [
    "SHORT_ANSWER_WORDS",
    "answer_probability",
    "answered",
    "closest_to_one",
    "exact_memorization",
    "extraction_strength",
    "folded",
    "forget_efficacy",
    "forget_quality",
    "harmonic_mean",
    "is_fluent",
    "is_garbled",
    "is_short",
    "mean",
    "probability_among",
    "reads_as_idk",
    "rouge_l_recall",
    "token_entropy",
    "truth_ratio",
    "truth_wins",
    "unspaced_pairs",
    "words",
]
