"""Where in a prompt a fact is held: the token that carries the edit, found by offsets through the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat_templates import templated
from ..errors import RequestError, first_words
from ..literal import Rendered, as_text, literal_ids, rendered
from ..request import parted

PLAIN_FORM = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and the index of the token that carries the edit."""

    ids: tuple[int, ...]
    position: int


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, question: str, form: str, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """The text in which a question reaches the model, up to where its answer begins.

    `form` is "chat", "plain", or "bare": the question alone, as editing harnesses ask it. Names of special tokens in
    the question are text to `encode` (`literal`). UniEraseError where the template raises, or changes such a question.
    """
    if form == "bare":
        return as_text(tokenizer, question)
    if form == "plain" or not has_chat_template(tokenizer):
        return rendered(tokenizer, lambda parts: PLAIN_FORM.format(question=parts[0]), [question])

    def write(parts: Sequence[str]) -> str:
        return templated(tokenizer, [{"role": "user", "content": parts[0]}], template_kwargs)

    return rendered(tokenizer, write, [question])


def encode(tokenizer: Any, text: str, form: str) -> list[int]:
    """Token ids of a rendered prompt. Chat templates write their own special tokens, so none is added twice."""
    if form == "chat" and has_chat_template(tokenizer):
        return literal_ids(tokenizer, text)[0]
    return begun(tokenizer, text)


def begun(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on: with what the tokenizer puts before it, without what it puts after it."""
    ids = literal_ids(tokenizer, text, add_special_tokens=True)[0]
    return ids[: len(ids) - closing(tokenizer)]


def closing(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts after a text; most put none."""
    whole, bare = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    starts = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
    return len(whole) - len(bare) - next(starts, len(whole) - len(bare))


def answer_text(tokenizer: Any, answer: str, form: str) -> str:
    """An answer as it follows a prompt of that form.

    A chat template ends with a line break or a mark of its own. After other text a word begins with its space, which
    tokenizers make a part of its first token.
    """
    return answer if form == "chat" and has_chat_template(tokenizer) else f" {answer.strip()}"


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

    `subject_last` is the token that holds the last character of the subject where it stands last in the question, as
    words of its own if it does so at all (ROME, section 2.2); `last` is the prompt's last token. `context` is text put
    before the question inside the same turn (MEMIT, section 4.3). Raises RequestError where the subject is not in the
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
    tokenizer: Any, question: str, subject: str | None, form: str, fact_token: str = "subject_last",
    template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:  # fmt: skip
    """The prompt of a question that is to be kept, and the first position at which an edit could act on it.

    The subject's last token, as for an edit of it; the question's first token where no subject is known.
    Raises RequestError where the template hides the question.
    """
    if subject or fact_token == "last":
        return locate(tokenizer, question, subject or "", form, fact_token, "", template_kwargs)
    text = render(tokenizer, question, form, template_kwargs)
    ids, offsets = encode_with_offsets(tokenizer, text, form)
    at = _holder(offsets, _question_start(text, question.strip()) + 1)
    return Prompt(ids, at or 0)


def locate_in_text(tokenizer: Any, text: str, subject: str) -> Prompt:
    """The same for a text that opens with the subject, such as MEMIT's "{subject} is a"."""
    ids, offsets = encode_with_offsets(tokenizer, as_text(tokenizer, text), "bare")
    end = text.find(subject) + len(subject)
    holders = [index for index, (start, stop) in enumerate(offsets) if start < end <= stop]
    return Prompt(ids, holders[-1])


def encode_with_offsets(tokenizer: Any, text: str, form: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Token ids of a rendered prompt, and the characters that each holds. RequestError where none are told."""
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError(
            f"{type(tokenizer).__name__} gives no character offsets, so the subject cannot be located. "
            "Load the tokenizer with use_fast=True."
        )
    templated = form == "chat" and has_chat_template(tokenizer)
    ids, offsets = literal_ids(tokenizer, text, add_special_tokens=not templated)
    length = len(ids) - (0 if templated else closing(tokenizer))
    return tuple(ids[:length]), offsets[:length]


def _holder(offsets: Sequence[tuple[int, int]], end: int) -> int | None:
    """The token that holds the character before `end`.

    Several tokens can share the bytes of one character; the last of them has read it whole.
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
            f"The chat template changes the question {first_words(question)} so that it cannot be found again."
        )
    return start
