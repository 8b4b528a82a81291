"""Prompts: how a question is written for the model, how an answer follows it, and their token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from .chat_templates import templated
from .literal import as_text, literal_ids, rendered
from .thinking import to_answer

PLAIN_FORM = "Question: {question}\nAnswer:"


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any, question: str, form: str, template_kwargs: Mapping[str, Any] | None = None, *, thinks: bool = False
) -> str:
    """The text in which a question reaches the model, up to where its answer begins.

    `form` is "chat", "plain", or "bare" (the question alone, as editing harnesses ask it). Where a chat template lets
    the model think first, the text ends behind an empty thinking part (`thinking`); with `thinks` it ends where the
    template ends, so that the model thinks. `encode` reads names of special tokens in the question as text
    (`literal`). Raises UniEraseError if the template raises, or changes such a question.
    """
    if form == "bare":
        return as_text(tokenizer, question)
    if form == "plain" or not has_chat_template(tokenizer):
        return rendered(tokenizer, lambda parts: PLAIN_FORM.format(question=parts[0]), [question])

    def write(parts: Sequence[str]) -> str:
        turns = [{"role": "user", "content": parts[0]}]
        return (templated if thinks else to_answer)(tokenizer, turns, template_kwargs)

    return rendered(tokenizer, write, [question])


def encode(tokenizer: Any, text: str, form: str) -> list[int]:
    """Token ids of a rendered prompt. Chat templates write their own special tokens, so none is added twice."""
    if form == "chat" and has_chat_template(tokenizer):
        return literal_ids(tokenizer, text)[0]
    return begun(tokenizer, text)


def begun(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text to continue: with the tokens that the tokenizer adds before it, not those after it."""
    ids = literal_ids(tokenizer, text, add_special_tokens=True)[0]
    return ids[: len(ids) - closing(tokenizer)]


def closing(tokenizer: Any) -> int:
    """The number of special tokens that the tokenizer adds after a text; mostly 0."""
    whole, bare = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    starts = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
    return len(whole) - len(bare) - next(starts, len(whole) - len(bare))


def answer_text(tokenizer: Any, answer: str, form: str) -> str:
    """An answer as it follows a prompt of that form.

    A chat template ends with a line break or a mark of its own. After other text a word begins with a space, which
    tokenizers make a part of its first token.
    """
    return answer if form == "chat" and has_chat_template(tokenizer) else f" {answer.strip()}"


def encode_with_offsets(tokenizer: Any, text: str, form: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Token ids of a rendered prompt, and the characters of each token. Raises RequestError without offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError(
            f"{type(tokenizer).__name__} gives no character offsets, so the subject cannot be located. "
            "Load the tokenizer with use_fast=True."
        )
    templated = form == "chat" and has_chat_template(tokenizer)
    ids, offsets = literal_ids(tokenizer, text, add_special_tokens=not templated)
    length = len(ids) - (0 if templated else closing(tokenizer))
    return tuple(ids[:length]), offsets[:length]
