"""The units in which texts are compared: words, in any script. Pure functions of texts.

Spellings of one text become equal. Compatibility forms (full-width letters, ligatures), case, the digits of other
scripts and apostrophes are folded (Unicode's NFKC, UAX 15), and invisible characters are dropped. In a script without
spaces, the units are user-perceived characters (UAX 29): a dictionary could split one name in two ways in two
sentences.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import regex

from ...facts.writing import HANGUL, IS_UNSPACED, PARTICLES, UNSPACED

#: An answer of at most this many words is short: it must be named in full.
SHORT_ANSWER_WORDS = 4
#: In scripts without spaces, this many characters count as a word: Chinese characters, and those of other scripts.
HAN_PER_WORD, OTHERS_PER_WORD = 2, 3

_RUN = regex.compile(rf"(?V1){UNSPACED}+|[\p{{L}}\p{{N}}_&&[^{UNSPACED}]][\p{{L}}\p{{M}}\p{{N}}_--{UNSPACED}]*")
_ASCII_RUN = re.compile(r"\w+")
# Letters other than Latin ones, which rouge_score does not see: they separate words there, as published.
_UNSEEN = regex.compile(
    r"(?V1)[[\p{L}\p{Nd}]--[\p{Latin}\p{Common}\p{Inherited}]][[\p{L}\p{M}\p{Nd}]--[\p{Latin}0-9]]*"
    r"|[\uFF10-\uFFDC\p{Nd}--[0-9]]+"
)
_HAN = regex.compile(r"\p{scx=Hani}")
_CONTRACTED = regex.compile(r"n't\b|'(?:s|d|ll|re|ve|m)\b")
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")
_SYMBOL = regex.compile(r"\p{S}")

_PARTICLE = regex.compile(PARTICLES)
_WITH_PARTICLE = regex.compile(rf"(\p{{Hangul}}+?)(?:{PARTICLES})")


def folded(text: str) -> str:
    """The text in the form in which texts are compared."""
    if text.isascii():
        return text.casefold()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = _INVISIBLE.sub("", text).replace("i\u0307", "i").translate(_APOSTROPHES)
    return "".join(map(_ascii_digit, text))


_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u02bb", "'"))


def _ascii_digit(letter: str) -> str:
    return str(unicodedata.decimal(letter, letter))


def words(text: str, *, apart: bool = False) -> list[str]:
    """Words and numbers in folded form, without punctuation. In a script without spaces, each character is a word.

    apart: an apostrophe separates words (l'Italie, Ankara'da, Austen's) instead of joining them (O'Brien). The endings
    of English contractions are then dropped.
    """
    text = folded(text)
    if apart:
        text = _CONTRACTED.sub(lambda found: "nt" if found[0] == "n't" else " ", text).replace("'", " ")
    text = text.replace("'", "")
    if text.isascii():
        return _ASCII_RUN.findall(text)
    found: list[str] = []
    for run in _RUN.findall(text):
        found += _characters(run) if IS_UNSPACED.match(run) else [run]
    return found


def symbols(text: str) -> list[str]:
    """The characters of a text without spaces. A text without words, such as "€", is compared by these."""
    return [each for each in _characters(folded(text)) if not each.isspace()]


def has_symbol(text: str) -> bool:
    """Whether a text has a symbol that says something by itself: a currency, mathematics, a picture."""
    return _SYMBOL.search(text) is not None


def _characters(text: str) -> list[str]:
    return [str(each) for each in regex.findall(r"\X", text)]


def is_short(answer: str) -> bool:
    """Whether an answer has at most SHORT_ANSWER_WORDS words. In a script without spaces, a few characters are one."""
    length = 0.0
    for word in words(answer):
        if not IS_UNSPACED.match(word):
            length += 1
        else:
            length += 1 / (HAN_PER_WORD if _HAN.match(word) else OTHERS_PER_WORD)
    # Thirds do not add up exactly.
    return length <= SHORT_ANSWER_WORDS + 1e-9


def holds(said: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the wanted words are said one after the other. Korean words may have particles."""
    return bool(wanted) and any(
        each.startswith(wanted[0]) and all(map(_same_word, wanted, said[i : i + len(wanted)]))
        for i, each in enumerate(said[: len(said) - len(wanted) + 1])
    )


def _same_word(wanted: str, said: str) -> bool:
    if wanted == said:
        return True
    return bool(said.startswith(wanted) and HANGUL.match(wanted[-1]) and _PARTICLE.fullmatch(said[len(wanted) :]))


def stems(text: str) -> list[str]:
    """The units of long texts: words without endings, and pairs of characters in scripts without spaces.

    The endings are English ones, by Porter's rules as in ROUGE, and Korean particles. On ASCII text the units are
    rouge_score's tokens.
    """
    found: list[str] = []
    for run in _RUN.findall(folded(text).replace("'", " ").replace("_", " ")):
        found += _pairs(_characters(run)) if IS_UNSPACED.match(run) else [_stem(run)]
    return found


def rouge_tokens(text: str) -> list[str]:
    """rouge_score's tokens, and between them the `stems` of letters that it does not see, in scripts other than Latin.

    Latin letters with accents separate words, as published: TOFU has names with them.
    """
    found: list[str] = []
    for seen, unseen in _parted(unicodedata.normalize("NFC", text)):
        found += _published(seen)
        found += stems(unseen)
    return found


def _parted(text: str) -> Iterator[tuple[str, str]]:
    end = 0
    for match in _UNSEEN.finditer(text):
        yield text[end : match.start()], match.group()
        end = match.end()
    yield text[end:], ""


def _published(text: str) -> list[str]:
    return list(_tokenizer().tokenize(text))


def unspaced_pairs(text: str) -> list[str]:
    """The pairs of neighbouring characters of a text, in scripts without spaces."""
    runs = (run for run in _RUN.findall(folded(text)) if IS_UNSPACED.match(run))
    return [pair for run in runs for pair in _pairs(_characters(run))]


def _pairs(characters: list[str]) -> list[str]:
    return ["".join(pair) for pair in itertools.pairwise(characters)] or characters


def _stem(word: str) -> str:
    if word.isascii():
        return next(iter(_published(word)), word)
    split = _WITH_PARTICLE.fullmatch(word)
    return str(split[1]) if split else word


@functools.cache
def _tokenizer() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)
