"""The input of a removal: facts with their answers, ordinary text, and the forgotten facts' words in random order."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..facts.request import NO_ANSWER, ForgetRequest
from ..facts.writing import standing
from ..models.examples import Example, answered
from ..models.literal import as_text, literal_ids, text_ids
from ..models.prompts import answer_text, encode, encode_with_offsets, render
from .moments import RemovalData

#: How often all words are shuffled, and the tokens of each text that is made of them.
SHUFFLES, WORDS_TOKENS = 2, 60


def make_data(
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
    kept_tokens: int,
    names: Sequence[str],
    seed: int,
    neighbours: Sequence[ForgetRequest] = (),
) -> RemovalData:
    """The data from facts and questions in all of `forms`, and from unchanged paragraphs. `end` closes an answer.

    Of the facts to keep, and of the neighbours, evenly spaced ones are taken, of about `kept_tokens` tokens each in
    all. `names` are names of invented subjects.

    limit is the model's context: longer text is cut. Raises RequestError for a longer fact, and for a fact to forget
    without an answer.
    """

    def told(facts: Sequence[ForgetRequest]) -> list[Example]:
        return [
            _checked(fact, answered(tokenizer, fact.question, fact.answer, form, end, template_kwargs), limit)
            for fact in facts
            for form in forms
        ]

    check_answers(forget)
    lost = told(forget)
    stays, around = (evenly(told(facts), kept_tokens, len(forms)) for facts in (kept, neighbours))
    asked = [
        encode(tokenizer, render(tokenizer, text, form, template_kwargs), form) for text in questions for form in forms
    ]
    read = [tokenizer(text)["input_ids"] for text in paragraphs]
    return RemovalData(
        forget=tuple(each.ids for each in lost),
        forget_starts=tuple(each.start for each in lost),
        kept=tuple(each.ids for each in stays),
        kept_starts=tuple(each.start for each in stays),
        text=tuple(tuple(ids[:limit]) for ids in (*read, *asked)),
        words=tuple(shuffled_words(tokenizer, forget, seed, min(WORDS_TOKENS, limit))),
        neighbours=tuple(each.ids for each in around),
        neighbour_starts=tuple(each.start for each in around),
        forget_subjects=tuple(
            subject_spans(tokenizer, fact, form, template_kwargs) for fact in forget for form in forms
        ),
        strangers=tuple(tuple(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) for name in names),
    )


def evenly(examples: Sequence[Example], tokens: int, together: int) -> list[Example]:
    """Evenly spaced examples with about `tokens` tokens in all; all examples if they have fewer.

    Every `together` examples in a row are the forms of one fact. They are taken or left out together.
    """
    total = sum(len(each.ids) for each in examples)
    groups = [examples[at : at + together] for at in range(0, len(examples), together)]
    count = len(groups) if total <= tokens else max(1, len(groups) * tokens // total)
    return [each for index in range(count) for each in groups[index * len(groups) // count]]


def subject_spans(
    tokenizer: Any, fact: ForgetRequest, form: str, template_kwargs: Mapping[str, Any]
) -> tuple[tuple[int, int], ...]:
    """Where the fact's subject stands in its question and answer, as spans (first, end) of the sequence's tokens.

    () if the fact has no subject, if the question does not hold it, or if the tokenizer gives no offsets.
    """
    subject, question = (fact.subject or "").strip(), fact.question.strip()
    if not subject or not getattr(tokenizer, "is_fast", False):
        return ()
    asked = render(tokenizer, fact.question, form, template_kwargs)
    begin = asked.rfind(question)
    # The template's own text after the question is not searched.
    places = [(begin + start, begin + end) for start, end in _found(subject, question)]
    if begin < 0 or not places:
        return ()
    _, prompt = encode_with_offsets(tokenizer, asked, form)
    said = answer_text(tokenizer, fact.answer, form)
    answer = literal_ids(tokenizer, as_text(tokenizer, said))[1]
    spans = _spans(prompt, places)
    return (*spans, *((len(prompt) + first, len(prompt) + end) for first, end in _spans(answer, _found(subject, said))))


def _found(subject: str, text: str) -> list[tuple[int, int]]:
    # The comparison ignores case. The text itself is not folded, since folding makes two letters of some.
    return standing(text, subject, ignore_case=True)


def _spans(offsets: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """For every place (start, end), the span of tokens that hold any of its characters."""
    found = []
    for start, end in places:
        held = [index for index, (low, high) in enumerate(offsets) if low < end and high > start]
        if held:
            found.append((held[0], held[-1] + 1))
    return found


def shuffled_words(tokenizer: Any, facts: Sequence[ForgetRequest], seed: int, length: int) -> list[tuple[int, ...]]:
    """All words of all questions and answers, shuffled SHUFFLES times, as texts of `length` tokens.

    Keeping these texts keeps the words, but not what the facts say with them.
    """
    words = [word for fact in facts for text in (fact.question, fact.answer) for word in text.split()]
    generator = random.Random(seed)
    opening = tokenizer("")["input_ids"]
    room = max(1, length - len(opening))
    found: list[tuple[int, ...]] = []
    for _ in range(SHUFFLES):
        ids = text_ids(tokenizer, " ".join(generator.sample(words, len(words))))
        found += [(*opening, *ids[at : at + room]) for at in range(0, len(ids), room)]
    return found


def check_answers(forget: Sequence[ForgetRequest]) -> None:
    """Raises RequestError for a fact to forget without an answer."""
    for fact in forget:
        if fact.answer == NO_ANSWER:
            raise RequestError(
                f"Removal needs the true answer of every request, but {fact.label} has none. Give it, or leave the "
                "removal (remove) out."
            )


def _checked(fact: ForgetRequest, found: Example, limit: int) -> Example:
    if len(found.ids) > limit:
        raise RequestError(
            f"{fact.label} needs {len(found.ids)} tokens with its answer, but the model's "
            f"context holds {limit}. Shorten it, or leave it out."
        )
    return found
