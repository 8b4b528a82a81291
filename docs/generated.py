"""Reference pages that are made while the site is built: MkDocs calls the functions that begin with `on_`.

The command line comes from typer, the methods and their settings from the registry and its dataclasses, and the schema
of report.json from the table in reference/report.md, which a test compares with a real report.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from unierase_plugin.cli import app
from unierase_plugin.hparams import HyperParams, UniEraseHyperParams
from unierase_plugin.methods.contract import Method
from unierase_plugin.methods.finetuning.settings import TrainingHyperParams
from unierase_plugin.plugins.catalogue import RESTRICTION
from unierase_plugin.plugins.registration import load_registry

REFERENCE = Path(__file__).parent / "reference"
#: JSON Schema of the types that the table in report.md names.
TYPES: dict[str, dict[str, Any]] = {
    "integer": {"type": "integer"},
    # NaN and infinity are written as null.
    "number": {"type": ["number", "null"]},
    "text": {"type": "string"},
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those in the folder."""
    schema = json.dumps(report_schema(), indent=2, ensure_ascii=False)
    for name, text in {
        "command-line.md": command_line(),
        "settings.md": settings(),
        "report-schema.md": SCHEMA_PAGE.format(schema=schema),
        "report.schema.json": schema,
    }.items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    return files


def command_line() -> str:
    """All commands and options of this package, as typer knows them."""
    command = get_command(app)
    context = Context(command, obj={"rich_markup_mode": "rich"})
    # Commands of plugins that happen to be installed are not on the page.
    with patch.dict(os.environ, {RESTRICTION: ""}):
        text = get_docs_for_click(obj=command, ctx=context, name="unierase", title="The command line")
    return text.strip() + "\n"


def settings() -> str:
    """Every method's keys with defaults, what is allowed, and meaning; those of a family once."""
    methods = load_registry("").methods
    parts = [SETTINGS_HEAD, "## Fine-tuning\n\nThese keys belong to every method that trains.\n\n"]
    parts.append(_table(TrainingHyperParams(), None))
    for method in methods.values():
        if method.hparams is not UniEraseHyperParams:
            parts.append(_section(method))
    return "\n".join(parts)


def _section(method: Method[Any]) -> str:
    values = method.hparams()
    head = f"## `{method.name}`\n\n{method.title[0].upper()}{method.title[1:]}. Source: {method.paper}.\n\n"
    for family, name, link in (
        (UniEraseHyperParams, "`unierase`", "hparams.md"),
        (TrainingHyperParams, "fine-tuning", "#fine-tuning"),
    ):
        if isinstance(values, family):
            table = _table(values, family())
            differs = "It has these keys of its own, or with other defaults.\n\n" if table else ""
            return f"{head}All keys of [{name}]({link}) apply. {differs}{table}"
    return head + _table(values, None)


def _table(values: HyperParams, beside: HyperParams | None) -> str:
    """Rows of the keys that `beside` lacks or has with another default."""
    known = {} if beside is None else beside.as_dict()
    meanings, ranges = {**_described(), **_comments(type(values))}, values.all_ranges()
    rows = [
        f"| `{key}` | {_default(value)} | {ranges.get(key, '')} | {meanings.get(key, '')} |".replace("|  |", "| |")
        for key, value in values.as_dict().items()
        if key not in known or known[key] != value
    ]
    return "\n".join(["| key | default | a number must | meaning |", "|---|---|---|---|", *rows, ""]) if rows else ""


def _default(value: Any) -> str:
    return "empty" if value == "" else f"`{json.dumps(value, ensure_ascii=False)}`"


def _described() -> dict[str, str]:
    """Meanings in the hand-written table of UniErase's keys."""
    text = (REFERENCE / "hparams.md").read_text(encoding="utf-8")
    return {row[0].strip("`"): row[-1] for row in _rows(text)}


def _comments(kind: type[HyperParams]) -> dict[str, str]:
    """The `#:` comment above each field of a class and of those it derives from."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if dataclasses.is_dataclass(each):
            comment: list[str] = []
            for line in inspect.getsource(each).splitlines():
                if said := re.match(r"    #: ?(.*)", line):
                    comment.append(said[1])
                    continue
                if named := re.match(r"    (\w+): ", line):
                    said_here = " ".join(comment).replace("|", "\\|").replace("<", "&lt;")
                    if said_here:
                        found[named[1]] = said_here
                comment = []
    return found


def _rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def report_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of report.json. A report lists what applies to its method, so that no key is required."""
    text = (REFERENCE / "report.md").read_text(encoding="utf-8")
    section = text.partition("## report.json")[2].partition("\n## ")[0].partition("\n### ")[0]
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json",
        **_object(),
    }
    for key, kind, meaning in _rows(section):
        _place(schema, key.strip("`").split("."), {**TYPES[kind], "description": _plain(meaning)})
    # Methods, those of plugins among them, add phases and figures of their own.
    schema["properties"]["seconds"]["additionalProperties"] = TYPES["number"]
    schema["properties"]["edit"]["additionalProperties"] = True
    return schema


def _object() -> dict[str, Any]:
    return {"type": "object", "properties": {}, "additionalProperties": False}


def _place(schema: dict[str, Any], path: list[str], leaf: dict[str, Any]) -> None:
    """Puts a leaf where its dotted name says; `[]` is a list, `<block>` any number of a block."""
    name, *rest = path
    if name == "<block>":
        schema["properties"] = {}
        schema["patternProperties"] = {"^[0-9]+$": leaf}
        return
    key = name.removesuffix("[]")
    inner = _object() if rest else leaf
    if name.endswith("[]"):
        inner = schema["properties"].setdefault(key, {"type": "array", "items": inner})["items"]
    else:
        inner = schema["properties"].setdefault(key, inner)
    if rest:
        _place(inner, rest, leaf)


def _plain(meaning: str) -> str:
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", meaning).replace("`", "").replace("\\|", "|")


SETTINGS_HEAD = """# Settings of the other methods

This page is made from the code. [UniErase's own keys](hparams.md) have a page of their own, with the reasons.
A YAML file holds any of a method's keys; what it leaves out keeps its default. An unknown key is refused.
"""
SCHEMA_PAGE = """# report.json as JSON Schema

[`report.schema.json`](report.schema.json) describes the file that every run writes. [The table](report.md#reportjson)
has the same keys for a reader. A key that does not apply to the method is left out.
Methods may add phases of their own under `seconds` and figures of their own under `edit`.

```json
{schema}
```
"""
