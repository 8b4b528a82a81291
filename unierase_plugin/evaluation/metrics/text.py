"""Metrics of one generated text: what it says, how it says it. Pure functions of texts."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

#: Answers of up to this many words must be named word for word; longer ones are judged by ROUGE-L recall.
SHORT_ANSWER_WORDS = 4
LONG_ANSWER_RECALL = 0.5

#: Pieces that whole text does not have: half a character, a special token, a letter repeated, a word without end.
BROKEN = re.compile(r"\ufffd|<\|?\w+\|?>|([^\W\d_])\1{3}|[^\W\d_]{25}", re.IGNORECASE)


def words(text: str) -> list[str]:
    """Lower-case words and numbers, punctuation dropped."""
    return re.findall(r"\w+", text.casefold().replace("'", "").replace("\u2019", ""))


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l_recall(reference: str, generated: str) -> float:
    """ROUGE-L recall with stemming, as TOFU reports it: share of the reference's words found in order. In [0, 1]."""
    return float(_scorer().score(reference, generated)["rougeL"].recall)


def answered(reference: str, generated: str) -> bool:
    """Whether a generation gives the answer: a short one (up to four words) named in full, a long one by its recall."""
    wanted, said = words(reference), words(generated)
    if len(wanted) <= SHORT_ANSWER_WORDS:
        return bool(wanted) and any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))
    return rouge_l_recall(reference, generated) >= LONG_ANSWER_RECALL


def is_fluent(generated: str) -> bool:
    """False for empty and for looping text: a third of its three-word runs or more said before, or one word alone."""
    said = words(generated)
    if not said:
        return False
    runs = [tuple(said[i : i + 3]) for i in range(len(said) - 2)]
    repeated = 1 - len(set(runs)) / len(runs) if runs else 0.0
    return repeated < 1 / 3 and (len(said) < 4 or len(set(said)) > 1)


def is_garbled(generated: str, context: str) -> bool:
    """Whether a text is broken, whatever it says: not fluent, or with pieces that no text of its language has.

    context: the question, and the right answer where there is one. Such pieces are letters of a script that the context
    does not use, U+FFFD, special tokens in the middle of the text, a letter four times in a row outside of numbers, and
    words of more than 24 letters. A wrong answer in whole words is not garbled, and a name made up of possible
    syllables is not told from one.
    """
    return (
        not is_fluent(generated)
        or BROKEN.search(generated) is not None
        or not _scripts(generated) <= _scripts(context) | {"LATIN"}
    )


def _scripts(text: str) -> set[str]:
    """The writing systems of a text's letters, by the first word of their Unicode names."""
    return {unicodedata.name(letter, "UNNAMED").split()[0] for letter in text if letter.isalpha()}


def reads_as_idk(generated: str, phrases: Sequence[str]) -> bool:
    """Whether a text says fluently that the answer is not known: it holds one of the phrases and does not loop.

    phrases: lower-case key phrases of refusals for lack of knowledge.
    """
    said = f" {' '.join(words(generated))} "
    return is_fluent(generated) and any(f" {' '.join(words(phrase))} " in said for phrase in phrases)


def token_entropy(tokens: Sequence[Hashable]) -> float:
    """How varied a text's tokens are: the entropy of their frequencies over that of as many different ones, in [0, 1].

    0 for a text of one token or none, and for one token repeated; 1 where no token is said twice. Yuan et al. 2024
    (arXiv 2410.08109), section 3, over the model's own tokens.
    """
    if len(tokens) < 2:
        return 0.0
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    # Not -0.0 where a single token is repeated.
    return max(0.0, -sum(share * math.log2(share) for share in shares) / math.log2(len(tokens)))
