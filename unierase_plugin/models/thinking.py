"""Where an answer begins if the chat template lets the model think first.

Facts are asked, edited and judged at the answer. So the thinking part is written into the prompt, empty and closed. The
template itself says how: by a switch that it reads, by what it writes before an answer that is given to it, or by the
mark with which it opens the thoughts. A template in which answers begin at once is left as it is.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UniEraseError
from .chat_templates import Turns, read_names, templated

logger = logging.getLogger(__name__)

#: An opening mark at the end of a prompt, such as `<think>`.
_OPEN = re.compile(r"<(\w*think\w*)>\s*\Z", re.IGNORECASE)
#: A closing mark, such as `</think>`.
_CLOSE = re.compile(r"</\w*think\w*>", re.IGNORECASE)
_QUESTION: Turns = ({"role": "user", "content": "Who?"},)
_ANSWER = "Ann."
#: The tokenizer's attribute that keeps what was found, by template and arguments.
_KEPT = "_unierase_thinking"


@dataclass(frozen=True)
class Thinking:
    """How a template's thinking part is left out; all empty for a template without one."""

    #: Arguments of the template that switch thinking off.
    switches: Mapping[str, Any] = field(default_factory=dict)
    #: Text after the prompt that closes the thinking part.
    closing: str = ""
    #: The mark between thoughts and answer in a generated text; "" if none is known.
    mark: str = ""

    def __bool__(self) -> bool:
        return bool(self.switches or self.closing)

    def parted(self, said: str) -> tuple[str, str]:
        """(thoughts, answer) of a generated text. Without the mark everything is thoughts: the answer was not reached.

        A text of a template without a thinking part is an answer.
        """
        if not self:
            return "", said
        if self.mark not in said:
            return said, ""
        thoughts, _, answer = said.rpartition(self.mark) if self.mark else ("", "", said)
        return thoughts, answer


def thinking_of(tokenizer: Any, settings: Mapping[str, Any] | None = None) -> Thinking:
    """How the tokenizer's chat template lets the model think, with these arguments of the template.

    An argument that is in `settings` is not a switch: it stays as given.
    """
    try:
        template = str(tokenizer.get_chat_template())
    except (AttributeError, ValueError):  # none, or several of which none is the default
        return Thinking()
    given = dict(settings or {})
    known: dict[tuple[str, str], Thinking] = vars(tokenizer).setdefault(_KEPT, {})
    key = (template, json.dumps(given, sort_keys=True, default=str))
    if key not in known:
        known[key] = _found(tokenizer, template, given)
    return known[key]


def to_answer(
    tokenizer: Any, turns: Sequence[Mapping[str, str]], settings: Mapping[str, Any] | None = None, **options: Any
) -> str:
    """The conversation as the template writes it, up to where an answer begins, behind an empty thinking part."""
    thinking = thinking_of(tokenizer, settings)
    return templated(tokenizer, turns, {**thinking.switches, **(settings or {})}, **options) + thinking.closing


def tell_thinking(tokenizer: Any, settings: Mapping[str, Any] | None = None) -> None:
    """Logs that a template's thinking part is left out, and what that means. Call it once a run."""
    if thinking_of(tokenizer, settings):
        logger.warning(
            "The chat template of %s lets the model think before it answers. Facts are asked, edited and judged behind "
            "an empty thinking part. What the model says while it thinks is another channel: the audit's attack "
            "`thinking` reads it.",
            getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
        )


def _found(tokenizer: Any, template: str, given: Mapping[str, Any]) -> Thinking:
    try:
        switches = _switches(tokenizer, template, given)
        prompt = templated(tokenizer, _QUESTION, {**switches, **given})
        if prompt == templated(tokenizer, _QUESTION, {**switches, **given}, add_generation_prompt=False):
            return Thinking()  # it does not say where an answer begins
        turns = (*_QUESTION, {"role": "assistant", "content": _ANSWER})
        whole = templated(tokenizer, turns, {**switches, **given}, add_generation_prompt=False)
    except UniEraseError:  # `check_chat_template` reports it
        return Thinking()
    before, found, _ = whole.rpartition(_ANSWER)
    between = before.removeprefix(prompt) if found and before.startswith(prompt) else ""
    opened = _OPEN.search(prompt)
    closing = between if between.strip() else f"\n</{opened[1]}>\n\n" if opened else ""
    marks = _CLOSE.findall(closing or prompt)
    return Thinking(switches, closing, marks[-1] if marks else closing.strip())


def _switches(tokenizer: Any, template: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments about thinking that the template reads, and that change the prompt when they are false."""
    found: dict[str, Any] = {}
    for name in read_names(template):
        if "think" not in name.casefold() or name in given:
            continue
        with_it = templated(tokenizer, _QUESTION, {**given, **found, name: False})
        if with_it != templated(tokenizer, _QUESTION, {**given, **found}):
            found[name] = False
    return found
