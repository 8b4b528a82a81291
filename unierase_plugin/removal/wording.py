"""Puts short answers into the sentence in which the model itself gives them, since it knows them in this form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..evaluation.metrics import answered, is_short, words
from ..facts.request import NO_ANSWER, ForgetRequest
from ..facts.writing import SENTENCE_MARKS
from ..models.generate import answers

#: Tokens of the model's text that are read to find the sentence.
ANSWER_TOKENS = 40
SENTENCE_END = re.compile(rf"(?<=[.!?])\s|(?<=[{SENTENCE_MARKS}])")


def in_own_words(
    model: Any,
    tokenizer: Any,
    facts: Sequence[ForgetRequest],
    *,
    form: str,
    template_kwargs: Mapping[str, Any],
    max_tokens: int,
) -> tuple[ForgetRequest, ...]:
    """The facts, with each short answer replaced by the sentence in which the model gives it.

    Answers of more than a few words, and answers that the model does not give, do not change.
    """
    short = [fact for fact in facts if fact.answer != NO_ANSWER and words(fact.answer) and is_short(fact.answer)]
    said = answers(
        model,
        tokenizer,
        [fact.question for fact in short],
        form=form,
        template_kwargs=dict(template_kwargs),
        max_new_tokens=ANSWER_TOKENS,
        max_tokens=max_tokens,
    )
    ends = [text for text in (tokenizer.eos_token, tokenizer.pad_token) if text]
    found = {
        fact.question: sentence
        for fact, text in zip(short, said, strict=True)
        if (sentence := first_sentence_with(fact.answer, _without(text, ends)))
    }
    return tuple(replace(fact, answer=found.get(fact.question, fact.answer)) for fact in facts)


def first_sentence_with(answer: str, text: str) -> str:
    """The text up to the end of the first sentence that gives the answer; "" if no sentence does."""
    bounds = [match.start() for match in SENTENCE_END.finditer(text.strip())]
    for end in (*bounds, None):
        if answered(answer, text.strip()[:end]):
            return text.strip()[:end]
    return ""


def _without(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, "")
    return text
