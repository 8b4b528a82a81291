"""What a removal reads: facts with their answers, ordinary text, and the forgotten facts' words in any order."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..locate_then_edit.positions import encode, render
from ..methods.material import Example, answered
from ..request import NO_ANSWER, ForgetRequest
from .moments import Material

#: Times that all words are shuffled, and tokens of a text that is made of them.
SHUFFLES, WORDS_TOKENS = 2, 60


def make_material(
    tokenizer: Any,
    forget: Sequence[ForgetRequest],
    kept: Sequence[ForgetRequest],
    paragraphs: Sequence[str],
    questions: Sequence[str],
    *,
    forms: Sequence[str],
    template_kwargs: Mapping[str, Any],
    end: int,
    limit: int,
    seed: int,
) -> Material:
    """Facts in all of `forms`, questions in them too, paragraphs as they are; `end` closes an answer.

    limit is the model's context: longer text is cut. A fact that is longer raises RequestError, as does a fact to
    forget whose answer is not given.
    """

    def told(facts: Sequence[ForgetRequest]) -> list[Example]:
        return [
            _checked(fact, answered(tokenizer, fact.question, fact.answer, form, end, template_kwargs), limit)
            for fact in facts
            for form in forms
        ]

    check_answers(forget)
    lost, stays = told(forget), told(kept)
    asked = [
        encode(tokenizer, render(tokenizer, text, form, template_kwargs), form) for text in questions for form in forms
    ]
    read = [tokenizer(text)["input_ids"] for text in paragraphs]
    return Material(
        tuple(each.ids for each in lost), tuple(each.start for each in lost),
        tuple(each.ids for each in stays), tuple(each.start for each in stays),
        tuple(tuple(ids[:limit]) for ids in (*read, *asked)),
        tuple(shuffled_words(tokenizer, forget, seed, min(WORDS_TOKENS, limit))),
    )  # fmt: skip


def shuffled_words(tokenizer: Any, facts: Sequence[ForgetRequest], seed: int, length: int) -> list[tuple[int, ...]]:
    """All words of all questions and answers, shuffled SHUFFLES times, as texts of `length` tokens.

    Whatever keeps these as they are keeps the words, and not what the facts say with them.
    """
    words = [word for fact in facts for text in (fact.question, fact.answer) for word in text.split()]
    generator = random.Random(seed)
    opening = tokenizer("")["input_ids"]
    room = max(1, length - len(opening))
    found: list[tuple[int, ...]] = []
    for _ in range(SHUFFLES):
        ids = tokenizer(" ".join(generator.sample(words, len(words))), add_special_tokens=False)["input_ids"]
        found += [(*opening, *ids[at : at + room]) for at in range(0, len(ids), room)]
    return found


def check_answers(forget: Sequence[ForgetRequest]) -> None:
    """Raises RequestError for a fact to forget whose answer is not given."""
    for fact in forget:
        if fact.answer == NO_ANSWER:
            raise RequestError(
                f"Removal needs the true answer of every request, and that of {fact.case_id or fact.question[:60]!r} "
                "is not given. Give it, or leave the removal (remove) out."
            )


def _checked(fact: ForgetRequest, found: Example, limit: int) -> Example:
    if len(found.ids) > limit:
        raise RequestError(
            f"{fact.case_id or fact.question[:60]!r} needs {len(found.ids)} tokens with its answer; the model's "
            f"context holds {limit}. Shorten it, or leave it out."
        )
    return found
