"""Short answers within the sentence that the model itself gives them in: that is where it holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..evaluation.generate import answers
from ..evaluation.metrics import SHORT_ANSWER_WORDS, answered, words
from ..request import NO_ANSWER, ForgetRequest
from .material import Asked

#: Tokens of an answer that are read to find the sentence.
ANSWER_TOKENS = 40
SENTENCE_END = re.compile(r"(?<=[.!?])\s")


def in_own_words(
    model: Any,
    tokenizer: Any,
    facts: Sequence[ForgetRequest],
    *,
    form: str,
    template_kwargs: Mapping[str, Any],
    max_tokens: int,
) -> tuple[ForgetRequest, ...]:
    """The facts, short answers in the place of which stands the sentence in which the model gives them.

    Left as they are: answers of more than a few words, and those that the model does not give.
    """
    short = [fact for fact in facts if fact.answer != NO_ANSWER and 0 < len(words(fact.answer)) <= SHORT_ANSWER_WORDS]
    said = answers(
        model, tokenizer, [fact.question for fact in short], form=form, template_kwargs=dict(template_kwargs),
        max_new_tokens=ANSWER_TOKENS, max_tokens=max_tokens,
    )  # fmt: skip
    ends = [text for text in (tokenizer.eos_token, tokenizer.pad_token) if text]
    found = {
        fact.question: sentence
        for fact, text in zip(short, said, strict=True)
        if (sentence := first_sentence_with(fact.answer, _without(text, ends)))
    }
    return tuple(replace(fact, answer=found.get(fact.question, fact.answer)) for fact in facts)


def ways(fact: ForgetRequest, told: ForgetRequest, forms: Sequence[str], reworded: bool) -> tuple[Asked, ...]:
    """How a fact is asked for: its question in every form, with the answer as it is told, and the sentence opened.

    fact: with the answer that was given; told: the same with the sentence that gives it (`in_own_words`).

    Where that sentence goes on to the answer, `reworded` adds two ways: the sentence up to there in the question's
    place, answered with all of it, and the same as bare text, which the answer ends. Otherwise what a model forgets
    hangs on the question's wording. None is added where the opening does not hold the subject.
    """
    found: list[Asked] = [(told, form) for form in forms]
    match = re.search(rf"(?<!\w){re.escape(fact.answer.strip())}(?!\w)", told.answer, re.IGNORECASE)
    opening = told.answer[: match.start()].rstrip() if match else ""
    subject = _within(told.subject, opening)
    if reworded and opening and subject:
        asked = replace(told, question=opening, subject=subject)
        found += [(asked, forms[0]), (replace(asked, answer=told.answer[len(opening) :]), "bare")]
    return tuple(found)


def _within(subject: str | None, text: str) -> str:
    """The subject as the text spells it; "" where it does not hold it as words of its own."""
    match = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text, re.IGNORECASE) if subject else None
    return match[0] if match else ""


def first_sentence_with(answer: str, text: str) -> str:
    """The text up to the end of the first sentence that gives the answer; "" where none does."""
    bounds = [match.start() for match in SENTENCE_END.finditer(text.strip())]
    for end in (*bounds, None):
        if answered(answer, text.strip()[:end]):
            return text.strip()[:end]
    return ""


def _without(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, "")
    return text
