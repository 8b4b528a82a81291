"""The page of promises names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"


def test_every_test_that_a_page_names_exists() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        named = re.findall(r"`((?:\w+/)?test_\w+\.py)::(\w+)`", page.read_text(encoding="utf-8"))
        missing = [f"{file}::{test}" for file, test in named if test not in _tests(TESTS / file)]
        assert missing == [], page.name


def test_every_promise_has_a_test() -> None:
    text = (DOCS / "explanation/promises.md").read_text(encoding="utf-8")
    promises = re.findall(
        r"^- \*\*.*?(?=^- \*\*|^#|\Z)", text.partition("## The fault suite")[0], re.MULTILINE | re.DOTALL
    )
    assert len(promises) > 15
    assert [promise for promise in promises if "::test_" not in promise] == []


def _tests(file: Path) -> set[str]:
    """Names of a file's test functions; none where there is no such file."""
    if not file.is_file():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
