"""The position in a prompt at which the model looks up a fact: the last token of its subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError, first_words
from ..facts.request import parted
from ..models.literal import Rendered, as_text
from ..models.prompts import encode_with_offsets, render


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and the index of the token that carries the edit."""

    ids: tuple[int, ...]
    position: int


def locate(
    tokenizer: Any,
    question: str,
    subject: str,
    form: str = "chat",
    fact_token: str = "subject_last",
    context: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:
    """The prompt of a question and the position of its fact.

    `subject_last` is the token that holds the last character of the subject's last occurrence in the question;
    occurrences as whole words come first (ROME, section 2.2). `last` is the prompt's last token. `context` is text
    before the question inside the same turn (MEMIT, section 4.3). Raises RequestError if the subject is not in the
    question or the template hides the question.
    """
    asked = f"{context} {question}" if context else question
    text = render(tokenizer, asked, form, template_kwargs)
    ids, offsets = encode_with_offsets(tokenizer, text, form)
    if fact_token == "last":
        return Prompt(ids, len(ids) - 1)
    at = _holder(offsets, _subject_end(text, question, subject))
    if at is None:
        raise RequestError(f"No token of {first_words(text)} holds the end of the subject {first_words(subject)}.")
    return Prompt(ids, at)


def locate_kept(
    tokenizer: Any,
    question: str,
    subject: str | None,
    form: str,
    fact_token: str = "subject_last",
    template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:
    """The prompt of a question to keep, and the first position at which an edit could act on it.

    This is the subject's last token, as for an edit of it, or the question's first token if no subject is known.
    Raises RequestError if the template hides the question.
    """
    if subject or fact_token == "last":
        return locate(tokenizer, question, subject or "", form, fact_token, "", template_kwargs)
    text = render(tokenizer, question, form, template_kwargs)
    ids, offsets = encode_with_offsets(tokenizer, text, form)
    at = _holder(offsets, _question_start(text, question.strip()) + 1)
    return Prompt(ids, at or 0)


def locate_in_text(tokenizer: Any, text: str, subject: str) -> Prompt:
    """The same for a text that begins with the subject, such as MEMIT's "{subject} is a"."""
    ids, offsets = encode_with_offsets(tokenizer, as_text(tokenizer, text), "bare")
    end = text.find(subject) + len(subject)
    holders = [index for index, (start, stop) in enumerate(offsets) if start < end <= stop]
    return Prompt(ids, holders[-1])


def _holder(offsets: Sequence[tuple[int, int]], end: int) -> int | None:
    """The token that holds the character before `end`.

    Several tokens can share the bytes of one character. The last of them has read the whole character.
    """
    return next((at for at in reversed(range(len(offsets))) if offsets[at][0] < end <= offsets[at][1]), None)


def _subject_end(text: str, question: str, subject: str) -> int:
    """Index one past the subject's last character in the rendered text."""
    question = question.strip()
    before, found, _ = parted(question, subject)
    if not found.strip():
        raise RequestError(
            f"The subject {first_words(subject)} does not occur in the question {first_words(question)}."
        )
    return _question_start(text, question) + len(before) + len(subject.rstrip())


def _question_start(text: str, question: str) -> int:
    within = text.spans[-1] if isinstance(text, Rendered) else (0, len(text))
    start = text.rfind(question, *within)
    if start < 0:
        raise RequestError(
            f"The chat template changes the question {first_words(question)}, so it cannot be found in the prompt."
        )
    return start
