"""Metrics of one generated text: what it says, and how it says it. Pure functions of texts."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import regex

from ...facts.subjects import STOP_WORDS
from ...facts.writing import UNSPACED
from .units import folded, has_symbol, holds, is_short, rouge_tokens, stems, symbols, words

#: A long answer counts as given from this share of its content words on, and from this number of them.
CONTENT_SHARE, CONTENT_LEAST = 0.4, 2
#: A long answer counts as given from this ROUGE-L recall on, if its question is not known.
LONG_ANSWER_RECALL = 0.5

#: Signs of broken text: half a character, a special token, a letter repeated, a word that does not end.
BROKEN = regex.compile(rf"(?V1)\ufffd|<\|?\w+\|?>|(\p{{L}})\1{{3}}|[\p{{L}}--{UNSPACED}]{{25}}", regex.IGNORECASE)


class _Tokens(NamedTuple):
    """The tokenizer interface that rouge_score expects."""

    tokenize: Callable[[str], list[str]]


@functools.cache
def _scorer(tokenize: Callable[[str], list[str]]) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokens(tokenize))


def rouge_l_recall(reference: str, generated: str) -> float:
    """ROUGE-L recall with stemming, as TOFU reports it: share of the reference's words found in order. In [0, 1].

    For Latin letters it is rouge_score's figure, to the last digit. rouge_score does not see other letters: here they
    count as `units.stems` splits them.
    """
    return float(_scorer(rouge_tokens).score(reference, generated)["rougeL"].recall)


def answered(reference: str, generated: str, question: str = "") -> bool:
    """Whether the text gives the answer: a short answer (up to four words) in full, a long one in its content words.

    The content words of a long answer are those that are neither function words nor in the question, so an echo of the
    question has none. The text must say two in five of them, at least two, in the answer's order. Without a question,
    or for an answer with no content words, it must say half of all the words (ROUGE-L recall). An answer without words,
    such as "\u20ac", is compared character by character.
    """
    if not words(reference):
        return holds(symbols(generated), symbols(reference))
    if is_short(reference):
        return any(holds(words(generated, apart=apart), words(reference, apart=apart)) for apart in (False, True))
    wanted, said = stems(reference), stems(generated)
    known = {*stems(question), *_function_words()} if question else frozenset[str]()
    content = [word for word in wanted if word not in known]
    if not content or not question:
        return _recall(wanted, said) >= LONG_ANSWER_RECALL
    needed = max(math.ceil(CONTENT_SHARE * len(content)), min(CONTENT_LEAST, len(content)))
    return round(_recall(content, said) * len(content)) >= needed


@functools.cache
def _function_words() -> frozenset[str]:
    return frozenset(stems(" ".join(STOP_WORDS)))


def _recall(wanted: Sequence[str], said: Sequence[str]) -> float:
    """Share of the wanted words that are said, in order."""
    return float(_scorer(str.split).score(" ".join(wanted), " ".join(said))["rougeL"].recall)


def is_fluent(generated: str) -> bool:
    """Whether the text is not empty and does not loop.

    A text loops if a third or more of its three-word runs occurred before, or if it repeats a single word. Words are
    those of `units.words`. A text without words is fluent if it has a symbol that says something, and says each
    character once.
    """
    said = words(generated)
    if not said:
        signs = symbols(generated)
        return has_symbol(generated) and len(signs) == len(set(signs))
    runs = [tuple(said[i : i + 3]) for i in range(len(said) - 2)]
    repeated = 1 - len(set(runs)) / len(runs) if runs else 0.0
    return repeated < 1 / 3 and (len(said) < 4 or len(set(said)) > 1)


def is_garbled(generated: str, context: str) -> bool:
    """Whether a text is broken: it is not fluent, or has pieces that no text of its language has.

    context: the question, and the true answer if there is one. Such pieces are letters of a script that the context
    does not use, U+FFFD, special tokens inside the text, a letter four times in a row outside numbers, and words of
    more than 24 letters in scripts with spaces. A wrong answer in whole words is not garbled. A made-up name of
    plausible syllables is not detected.
    """
    return (
        not is_fluent(generated)
        or BROKEN.search(generated) is not None
        or not _scripts(generated) <= _scripts(context) | {"LATIN"}
    )


def _scripts(text: str) -> set[str]:
    """The writing systems of a text's letters, by the first word of their Unicode names."""
    found = {unicodedata.name(letter, "UNNAMED").split()[0] for letter in folded(text) if letter.isalpha()}
    # Japanese writes in three scripts at once.
    return found | _JAPANESE if found & _KANA else found


_KANA = frozenset(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"))
_JAPANESE = _KANA | {"CJK", "IDEOGRAPHIC"}


def reads_as_idk(generated: str, phrases: Sequence[str]) -> bool:
    """Whether a text says fluently that the answer is not known: it has one of the phrases and does not loop.

    phrases: lower-case key phrases of refusals. Those that ship with the package are English.
    """
    said = f" {' '.join(words(generated))} "
    return is_fluent(generated) and any(f" {' '.join(words(phrase))} " in said for phrase in phrases)


def token_entropy(tokens: Sequence[Hashable]) -> float:
    """How varied the tokens are, in [0, 1]: the entropy of their frequencies, divided by that of all different tokens.

    0 for at most one token and for one token repeated; 1 if no token repeats. Yuan et al. 2024 (arXiv 2410.08109),
    section 3, over the model's own tokens.
    """
    if len(tokens) < 2:
        return 0.0
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    # Not -0.0 for a single repeated token.
    return max(0.0, -sum(share * math.log2(share) for share in shares) / math.log2(len(tokens)))
