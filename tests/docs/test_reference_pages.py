"""The reference pages name every key that there is, and none that is not."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from decoders import tiny_decoder
from small import FORGET, FORGET_MORE, HPARAMS, RETAIN, save_base, shrink

from unierase_plugin import UniEraseHyperParams, unlearn

#: Transformers before 5 keep experts in lists, which are not edited.
STACKED = int(transformers.__version__.split(".")[0]) >= 5
DOCS = Path(__file__).parents[2] / "docs/reference"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`unierase/` of two steps, with all that can be in it; the first was an edit alone, the second has a removal."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, folder / "cache")
        model: Path = save_base(folder / "base")
        hparams = HPARAMS.replace(retain_neighbours=1, retain_key_weight=1.0)
        for name, facts in (("one", FORGET), ("two", FORGET_MORE)):
            settings = hparams.replace(remove=name == "two", removal_rank=8)
            unlearn(model, facts, retain=RETAIN, hparams=settings, out=folder / name, keep_requests=True)
            model = folder / name
        if STACKED:
            mixed = save_base(folder / "mixture", tiny_decoder("qwen3_moe"))
            unlearn(mixed, FORGET, retain=RETAIN, hparams=HPARAMS, out=folder / "mixed")
    return model / "unierase"


def rows(page: str, section: str) -> list[list[str]]:
    """Cells of the tables under a page's heading, or of all its tables where `section` is empty."""
    text = (DOCS / page).read_text(encoding="utf-8")
    parts = [part for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.startswith(section)]
    lines = [line for part in parts for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def leaves(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a JSON value by dotted name; all numbers of blocks have one name, hyper-parameters too."""
    if isinstance(value, dict) and not above.endswith("chat_template_kwargs"):
        for key, item in value.items():
            shown = "<block>" if key.isdigit() else "<name>" if above.endswith(("hparams.", "files.")) else key
            # A hyper-parameter's value may be a list; the page on hyper-parameters says so.
            yield from [(f"{above}<name>", item)] if shown == "<name>" else leaves(item, f"{above}{shown}.")
    elif isinstance(value, list):
        yield from (leaf for item in value for leaf in leaves(item, f"{above.removesuffix('.')}[]."))
    else:
        yield above.removesuffix("."), value


def reports(record: Path) -> list[Any]:
    """Of both steps: the closed form's figures are those of an edit alone. And of a mixture of experts."""
    others = [record.parents[1] / name / "unierase" for name in ("one", *(["mixed"] if STACKED else []))]
    return [json.loads((folder / "report.json").read_text()) for folder in (record, *others)]


@pytest.mark.parametrize("file", ["report.json", "manifest.json", "ledger.jsonl", "digests.json"])
def test_the_page_on_reports_has_every_key_of_a_file_and_no_other(record: Path, file: str) -> None:
    values = (
        [json.loads(line) for line in (record / file).read_text().splitlines()]
        if file.endswith("l")
        else [json.loads((record / file).read_text())]
    )
    named = [row[0] for row in rows("report.md", file) if STACKED or not row[0].startswith("edit.routes.")]
    assert len(named) == len(set(named))
    if file == "report.json":
        values = reports(record)
    found = {key for value in values for key, _ in leaves(value)}
    # A list that may be null has one row.
    assert set(named) == {key for key in found if f"{key}[]" not in found}


def test_the_page_on_reports_has_the_type_of_every_figure(record: Path) -> None:
    """report.json's schema, which the site has, is made from this table."""
    kinds = {"integer": (int,), "number": (int, float, type(None)), "text": (str,)}
    typed = {key: kinds[kind] for key, kind, _ in rows("report.md", "report.json")}
    found = [leaf for report in reports(record) for leaf in leaves(report)]
    assert [(key, value) for key, value in found if not isinstance(value, typed[key])] == []


def test_the_page_on_hyper_parameters_has_every_field_once_with_its_default() -> None:
    defaults = UniEraseHyperParams().as_dict()
    given = {name: "" if default == "empty" else yaml.safe_load(default) for name, default, _ in rows("hparams.md", "")}
    wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    assert sorted(given) == sorted(spec.name for spec in dataclasses.fields(UniEraseHyperParams))
    assert given == wanted


def test_every_row_says_something() -> None:
    table = [*rows("report.md", ""), *rows("hparams.md", "")]
    assert len(table) > 80
    assert [row[0] for row in table if len(row[-1]) < 6] == []
