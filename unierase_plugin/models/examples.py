"""A question with its answer, as token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .literal import text_ids
from .prompts import answer_text, encode, render


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt, the answer and the end."""

    ids: tuple[int, ...]
    #: Where the answer begins.
    start: int


def answered(
    tokenizer: Any, question: str, answer: str, form: str, end: int, template_kwargs: Mapping[str, Any]
) -> Example:
    """A question in one prompt form, its answer, and the token that ends the answer."""
    prompt = encode(tokenizer, render(tokenizer, question, form, template_kwargs), form)
    said = text_ids(tokenizer, answer_text(tokenizer, answer, form))
    return Example((*prompt, *said, end), len(prompt))
