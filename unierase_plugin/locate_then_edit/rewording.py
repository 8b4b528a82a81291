"""Rewords a question by rule, for edits that shall also hold when the question is worded differently."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..facts.request import parted

#: Put before a question.
LEAD_IN = "I was wondering:"


def with_typo(text: str) -> str:
    """The text with the two middle letters of its longest word swapped; unchanged if no word has four letters."""
    words = sorted(re.finditer(r"[^\W\d_]{4,}", text), key=lambda word: -len(word[0]))
    if not words:
        return text
    at = (words[0].start() + words[0].end()) // 2
    return text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :]


CHANGES: tuple[Callable[[str], str], ...] = (str.lower, with_typo)


def reworded(question: str, subject: str) -> tuple[tuple[str, str], ...]:
    """(question, subject), changed in each way. The subject stays where `locate` finds it."""
    before, _, after = parted(question, subject)
    changed = tuple((change(before) + change(subject) + change(after), change(subject)) for change in CHANGES)
    return *changed, (f"{LEAD_IN} {question}", subject)


#: How many questions `reworded` gives.
REWORDINGS = len(CHANGES) + 1
