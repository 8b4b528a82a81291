"""The texts that ship with the package: sentences, phrases, questions, ordinary text and the demo's facts."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from ..errors import UniEraseError

#: Names of the bundled texts, with one entry a line or one a paragraph.
LINES = ("idk_sentences", "idk_phrases", "questions", "invented_names")
PARAGRAPHS = ("ordinary_text", "ordinary_text_train")


def lines(name: str) -> tuple[str, ...]:
    """The lines of a bundled text. Raises UniEraseError for a name that is not in LINES."""
    if name not in LINES:
        raise UniEraseError(f"There is no bundled list {name!r}. There are: {', '.join(LINES)}.")
    return tuple(line for line in _text(f"{name}.txt").splitlines() if line.strip())


def paragraphs(name: str) -> tuple[str, ...]:
    """The paragraphs of a bundled text. Raises UniEraseError for a name that is not in PARAGRAPHS."""
    if name not in PARAGRAPHS:
        raise UniEraseError(f"There is no bundled text {name!r}. There are: {', '.join(PARAGRAPHS)}.")
    return tuple(part.strip() for part in _text(f"{name}.txt").split("\n\n") if part.strip())


def demo_facts() -> dict[str, list[dict[str, Any]]]:
    """{"forget": [...], "retain": [...]}: facts that SmolLM2-135M-Instruct knows, each with its kind and subject."""
    facts: dict[str, list[dict[str, Any]]] = json.loads(_text("demo_facts.json"))
    return facts


def neighbour_kinds() -> dict[str, Any]:
    """Subjects and relations by kind. `locate_then_edit.neighbours` makes neighbours of a fact from them."""
    kinds: dict[str, Any] = json.loads(_text("neighbours.json"))
    return kinds


def _text(name: str) -> str:
    return files(__package__).joinpath("data", name).read_text(encoding="utf-8")
