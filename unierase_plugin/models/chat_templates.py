"""Renders a tokenizer's chat template once when it is loaded, so that its faults are known before the work.

A template is a program that comes with the model. It may raise, expect an argument that nobody gives, or write today's
date into every prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ..errors import UniEraseError, listed, reason, shown

logger = logging.getLogger(__name__)

Turns = Sequence[Mapping[str, str]]

_QUESTION: Turns = ({"role": "user", "content": "Who?"},)
_ANSWERED: Turns = (*_QUESTION, {"role": "assistant", "content": "Ann."})


def templated(tokenizer: Any, turns: Turns, settings: Mapping[str, Any] | None = None, **options: Any) -> str:
    """The conversation as the tokenizer's template writes it, up to where an answer begins.

    settings: the template's own arguments. Raises UniEraseError with the template's own message if it raises.
    """
    options = {"tokenize": False, "add_generation_prompt": True, **options}
    try:
        return str(tokenizer.apply_chat_template(list(turns), **options, **(settings or {})))
    except Exception as error:  # templates raise whatever their authors, Jinja and Python raise
        raise refusal(tokenizer, error) from error


def refusal(tokenizer: Any, error: Exception) -> UniEraseError:
    """The message for a template that raises."""
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping) and "default" not in template:
        return UniEraseError(
            f"{shown(name)} has several chat templates and none that is the default: {listed(template)}. Make one of "
            "them the model's: tokenizer.chat_template = tokenizer.chat_template[NAME], and tokenizer.save_pretrained "
            "into the model's folder."
        )
    said = f"{type(error).__name__}: {reason(error)}".rstrip(".")
    return UniEraseError(
        f"The chat template of {shown(name)} cannot be rendered ({said}). Give what it asks for in the setting "
        "chat_template_kwargs, correct tokenizer.chat_template and save the tokenizer into the model's folder, or set "
        "it to None to ask in the plain form."
    )


def check_chat_template(tokenizer: Any, settings: Mapping[str, Any] | None = None) -> None:
    """Renders the template once in each way in which a run will use it. Call it once a run, before the work.

    Raises UniEraseError if it raises. If the template writes the date into prompts, the log says so, with the setting
    that fixes the date.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    templated(tokenizer, _QUESTION, settings)
    templated(tokenizer, _ANSWERED, add_generation_prompt=False)
    given = dict(settings or {})
    if not _asks_date(tokenizer, given):
        return
    names, form = _read(tokenizer)
    today = datetime.now().astimezone().strftime(form)
    name = next((each for each in names if not _asks_date(tokenizer, {**given, each: today})), "")
    remedy = (
        f'The setting chat_template_kwargs: {{{name}: "{today}"}} keeps it the same.'
        if name
        else "The template has no setting for it: write the date into it, and save the tokenizer into the model's "
        "folder."
    )
    logger.warning(
        "The chat template of %s writes the date into every prompt, so that the same run gives other figures on "
        "another day. %s",
        getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
        remedy,
    )


def _asks_date(tokenizer: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a template that renders calls the function for the date: without that function it raises."""
    try:
        templated(tokenizer, _QUESTION, {"strftime_now": "", **settings})
    except UniEraseError:
        return True
    return False


def _read(tokenizer: Any) -> tuple[list[str], str]:
    """Names that the template reads, which it may take as settings, and the format in which it wants the date."""
    from jinja2 import nodes

    template, form = tokenizer.get_chat_template(), "%d %b %Y"
    tree = _parsed(template)
    for call in tree.find_all(nodes.Call) if tree else ():
        if isinstance(call.node, nodes.Name) and call.node.name == "strftime_now" and call.args:
            form = str(getattr(call.args[0], "value", form))
    return read_names(template), form


def read_names(template: str) -> list[str]:
    """Names that a template reads, which it may take as settings, in their order; none if Jinja cannot parse it."""
    from jinja2 import nodes

    tree = _parsed(template)
    names = dict.fromkeys(node.name for node in tree.find_all(nodes.Name)) if tree else {}
    known = {"messages", "strftime_now", "raise_exception", "add_generation_prompt"}
    return [name for name in names if name not in known]


def _parsed(template: str) -> Any:
    from jinja2 import Environment, TemplateError

    try:
        return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:  # transformers has further tags
        return None
