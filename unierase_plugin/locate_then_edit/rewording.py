"""The same question in other words by rule, for edits that are to hold when it is not asked letter by letter."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..facts.request import parted

#: Put before a question.
LEAD_IN = "I was wondering:"


def with_typo(text: str) -> str:
    """The two letters in the middle of the longest word swapped; nothing where no word has four letters."""
    words = sorted(re.finditer(r"[^\W\d_]{4,}", text), key=lambda word: -len(word[0]))
    if not words:
        return text
    at = (words[0].start() + words[0].end()) // 2
    return text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :]


CHANGES: tuple[Callable[[str], str], ...] = (str.lower, with_typo)


def reworded(question: str, subject: str) -> tuple[tuple[str, str], ...]:
    """(question, subject) changed in each way, the subject in it where `locate` will find it."""
    before, _, after = parted(question, subject)
    changed = tuple((change(before) + change(subject) + change(after), change(subject)) for change in CHANGES)
    return *changed, (f"{LEAD_IN} {question}", subject)


#: How many `reworded` gives.
REWORDINGS = len(CHANGES) + 1
