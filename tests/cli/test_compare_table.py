"""The table that `unierase compare` prints: whole figures and words, however narrow the terminal is."""

from __future__ import annotations

import re

import pytest
from compared import METHODS, results

from unierase_plugin.cli.compare import _print
from unierase_plugin.cli.console import Screen
from unierase_plugin.compare.columns import COLUMNS
from unierase_plugin.compare.tables import cell

SHOWN = ("forget_rouge", "forget_prob", "idk", "keep_rouge", "matched_rouge", "matched_prob", "seconds")


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_figure_and_no_word_is_broken(
    width: int, seeds: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    found = results(seeds)
    found["rows"][0]["label"] = "npo_gd:a_name_that_is_longer_than_the_column"
    _print(Screen(), found)
    table, _, _ = capsys.readouterr().out.partition("\n- ")
    assert "rmu " in table
    assert "failed" in table
    assert max(map(len, table.splitlines())) <= width
    assert table.count("┃ method ") == 1 if width == 200 else width > 80 or table.count("┃ method ") > 1
    columns = [column for column in COLUMNS if column.key in SHOWN]
    for column in columns:
        assert all(re.search(rf"\b{re.escape(word)}\b", table) for word in column.title.split())
    for label in METHODS.keys() - {"reference"}:
        [row] = [row for row in found["rows"] if row["label"] == label]
        lines = [line.strip("│ ").split("│") for line in table.splitlines() if line.startswith(f"│ {label} ")]
        said = [text.strip() for _, *rest in lines for text in rest]
        assert said == [cell(column, row["figures"][column.key]) for column in columns]
