"""Converts the values of hyper-parameters to their declared types, and refuses values that do not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from ..errors import HyperParamsError, shown

#: The largest seed that every library that draws with it accepts. numpy's limit is the lowest.
MOST_SEED = 2**32 - 1
#: Arguments that this package or transformers always gives a chat template.
TEMPLATE_OWN = ("self", "conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message")


def checked_seed(seed: int) -> int:
    """The seed. Raises HyperParamsError if a library that draws with it would refuse it later."""
    if not 0 <= seed <= MOST_SEED:
        raise HyperParamsError(f"seed = {shown(seed)} must be a whole number from 0 to {MOST_SEED}.")
    return seed


def coerced(name: str, value: Any, hint: Any) -> Any:
    """The value in its declared type: YAML reads 1e-1 as text, and a tuple as a list.

    Raises HyperParamsError for a value of another type.
    """
    origin = get_origin(hint)
    try:
        if origin is tuple:
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise TypeError
            return tuple(coerced(name, item, get_args(hint)[0]) for item in value)
        if origin is dict:
            return {key: _checked_argument(f"{name}: {shown(key)}", each) for key, each in dict(value).items()}
        if hint is bool:
            if not isinstance(value, bool):
                raise TypeError
            return value
        if hint is int:
            # Not through a float: it has no room for all digits of a seed.
            if isinstance(value, int) and not isinstance(value, bool):
                return _bounded(name, value)
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise TypeError
            return int(float(value))
        if hint is float:
            if isinstance(value, bool) or not math.isfinite(float(value)):
                raise TypeError
            return float(value)
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise TypeError
        str(value).encode()  # refuses half surrogate pairs
        return str(value)
    except UnicodeEncodeError:
        raise HyperParamsError(f"Hyper-parameter {name} = {shown(value)} is not UTF-8 text.") from None
    except (TypeError, ValueError, OverflowError):
        raise HyperParamsError(f"Hyper-parameter {name} = {shown(value)} is not {in_words(hint)}.") from None


#: Types in YAML's words: for one value, and for several.
_WORDS = {
    str: ("a text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    bool: ("true or false", "true or false"),
    dict: ("a mapping", "mappings"),
    list: ("a list", "lists"),
    tuple: ("a list", "lists"),
    type(None): ("nothing", "nothing"),
}


def in_words(hint: Any, several: bool = False) -> str:
    """A type in words for people who write YAML: tuple[int, ...] is a list of whole numbers."""
    parts = get_args(hint)
    kind = get_origin(hint) or hint
    if kind not in _WORDS:
        return " or ".join(in_words(each, several) for each in parts) or getattr(hint, "__name__", str(hint))
    of = f" of {in_words(parts[0], several=True)}" if kind in (tuple, list) and parts else ""
    return _WORDS[kind][several] + of


def _bounded(name: str, value: int) -> int:
    if abs(value) >= 2**63:
        raise HyperParamsError(f"Hyper-parameter {name} = {shown(value)} has more than 63 bits. Give a smaller one.")
    return value


def checked_template_arguments(given: Mapping[str, Any]) -> None:
    """Raises HyperParamsError for an argument of a chat template that this package, or transformers, already gives."""
    clash = [name for name in given if name in TEMPLATE_OWN]
    if clash:
        raise HyperParamsError(
            f"chat_template_kwargs has {clash[0]!r}, which every chat template gets already. Leave it out: "
            "chat_template_kwargs is for the template's own arguments, such as enable_thinking."
        )


def _checked_argument(name: str, value: Any) -> Any:
    """An argument for a chat template. It must be a JSON value, since it becomes a part of the keys in the cache."""
    if isinstance(value, Mapping):
        return {key: _checked_argument(name, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_checked_argument(name, each) for each in value]
    if value is not None and not isinstance(value, (str, int, float)):
        raise HyperParamsError(
            f"Hyper-parameter {name} is a {type(value).__name__}. Give texts, numbers, true, false, null, lists or "
            "mappings; a date goes in quotes."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise HyperParamsError(f"Hyper-parameter {name} is {value}. Give a finite number.")
    return value
