"""Lets the Python reference show the `#:` comment above a field or constant as its description."""

from __future__ import annotations

from typing import Any

from griffe import Attribute, Docstring, Extension


class FieldComments(Extension):
    """A docstring below the field goes before a comment above it."""

    def on_attribute_instance(self, *, attr: Attribute, **kwargs: Any) -> None:
        if attr.docstring is not None or attr.lineno is None:
            return
        above = attr.lines_collection[attr.filepath][: attr.lineno - 1]
        comment: list[str] = []
        while above and (line := above.pop().strip()).startswith("#:"):
            comment.insert(0, line.removeprefix("#:").strip())
        if comment:
            attr.docstring = Docstring(" ".join(comment), parent=attr)
