"""Writes an HTML page from a Jinja template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, filters: Mapping[str, Callable[..., Any]] = MappingProxyType({}), **values: Any) -> str:
    """Returns the text of a template. Every value is escaped, unless it is a `markupsafe.Markup`.

    filters: functions that the template may apply, by name, beside Jinja's own.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template.name).render(**values)
