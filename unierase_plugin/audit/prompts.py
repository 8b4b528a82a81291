"""A question as it reaches an audited model: as a chat or as plain text, with other turns and the answer begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.chat_templates import refusal
from ..models.literal import literal_ids, rendered, text_ids
from ..models.prompts import answer_text, begun, has_chat_template
from ..models.thinking import Thinking, thinking_of
from .contract import Audited, Context

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text, which the report shows, and its token ids."""

    text: str
    ids: tuple[int, ...]


def prompt_for(
    subject: Audited,
    context: Context,
    question: str,
    *,
    prefill: str = "",
    system: str = "",
    before: Turns = (),
    form: str = "",
    then: Sequence[int] = (),
    thinks: bool = False,
) -> Prompt:
    """Returns a question as the model reads it, up to the place where the answer begins.

    prefill: text that the answer already begins with, without a space in front. system: a system prompt; it goes
    before the question if the chat template knows none. before: earlier (question, answer) turns. form: "chat" or
    "plain"; the context's if it is empty. then: token ids that follow all this. thinks: whether the model may think
    first, where its chat template lets it; else the thinking part is empty.
    """
    tokenizer = subject.tokenizer
    chat = (form or context.form) == "chat" and has_chat_template(tokenizer)

    def write(parts: Sequence[str]) -> str:
        said = parts[: 2 * len(before) + 1]
        turns = [{"role": _ROLES[index % 2], "content": text} for index, text in enumerate(said)]
        begun_with = "".join(parts[len(said) :])
        if chat:
            return _templated(tokenizer, turns, system, context.template_kwargs, thinks) + begun_with
        text = _written_out([*([{"role": "user", "content": system}] if system else []), *turns])
        return text + (f" {begun_with}" if begun_with else "")

    parts = [*(text for pair in before for text in pair), question, *([prefill] if prefill else [])]
    text = rendered(tokenizer, write, parts)
    ids = literal_ids(tokenizer, text)[0] if chat else begun(tokenizer, text)
    shown = text + (str(tokenizer.decode(list(then))) if then else "")
    return Prompt(shown, (*ids, *then))


_ROLES = ("user", "assistant")


def _templated(
    tokenizer: Any, turns: list[dict[str, str]], system: str, settings: Mapping[str, Any], thinks: bool
) -> str:
    from jinja2 import TemplateError

    first = [{"role": "system", "content": system}] if system else []
    thinking = Thinking() if thinks else thinking_of(tokenizer, settings)
    try:
        text = tokenizer.apply_chat_template(
            [*first, *turns], tokenize=False, add_generation_prompt=True, **{**thinking.switches, **settings}
        )
    except TemplateError as error:  # such as Gemma's, which has no system turn
        if not system:
            raise refusal(tokenizer, error) from error
        merged = [{**turns[0], "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]
        return _templated(tokenizer, merged, "", settings, thinks)
    return str(text) + thinking.closing


def _written_out(turns: list[dict[str, str]]) -> str:
    """The plain form of a conversation, like `models.prompts.PLAIN_FORM` for one question."""
    marks = {"user": "Question: {}\n", "assistant": "Answer: {}\n\n"}
    return "".join(marks[turn["role"]].format(turn["content"]) for turn in turns) + "Answer:"


def answer_ids(subject: Audited, context: Context, answer: str, prefill: bool = False) -> list[int]:
    """Token ids of an answer after a prompt, with a space in front if text stands there."""
    text = answer_text(subject.tokenizer, answer, "bare" if prefill else context.form)
    return text_ids(subject.tokenizer, text)
