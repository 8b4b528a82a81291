"""The comparison as one HTML page that needs no other file: figures, charts, and every answer side by side.

Text, table, charts and settings are in the HTML and need no script. `page.js` sorts, filters and shows the answers. It
keeps the choices in the address, so that a view can be sent to somebody.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..storage.atomic import write_text
from ..storage.html import render
from .columns import Column, shown
from .plots import embedded
from .tables import ARROWS, filled

Results = Mapping[str, Any]


def write_page(path: Path, results: Results, charts: Mapping[str, str]) -> None:
    """Writes the page of a comparison as results.json holds it. charts: SVG files by name (`plots.draw`)."""
    write_text(path, page(results, charts))


def page(results: Results, charts: Mapping[str, str]) -> str:
    """Returns the HTML text."""
    here, columns = Path(__file__).parent, filled(results)
    filters: dict[str, Callable[..., Any]] = {
        "as_shown": lambda value, column: shown(column, value),
        "base_name": _base_name,
        "chosen": _chosen,
        "groups": _groups,
        "number": repr,
        "tries": _tries,
    }
    return render(
        here / "page.html.j2",
        filters,
        results=results,
        setup=results["setup"],
        setting=_setting(results),
        columns=columns,
        # The first column of each group has a line on its left.
        first=[column for at, column in enumerate(columns) if at == 0 or columns[at - 1].group != column.group],
        arrows=ARROWS,
        charts={name: Markup(embedded(text)) for name, text in charts.items()},
        meanings=[(column.title, f"{column.meaning} ({column.group.lower()})") for column in columns],
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        data=Markup(_data(results)),
    )


def _base_name(name: str) -> str:
    return Path(name).name or name


def _groups(columns: Sequence[Column]) -> list[str]:
    return list(dict.fromkeys(column.group for column in columns))


def _setting(results: Results) -> list[tuple[str, str]]:
    setup, facts = results["setup"], results["setup"]["facts"]
    searched = sum(bool(found["tries"]) for found in results["searches"].values())
    tuned = f"best of {setup['budget']} tries each, for {searched} of the methods"
    return [
        (
            "Facts",
            f"{facts['forget']} to forget, {facts['keep']} to keep; reported {facts['forget_shown']} and "
            f"{facts['keep_shown']}",
        ),
        ("Scenario", setup["scenario"] + (f", {setup['steps']} steps" if setup["scenario"] == "sequential" else "")),
        ("Settings", tuned if searched else "as published or set by hand"),
        ("Seeds", ", ".join(map(str, setup["seeds"]))),
        ("Reference", _base_name(setup["reference"]) if setup["reference"] else "none"),
        ("Truth ratio", "the data has wrong answers" if setup["truth_ratio"]["forget"] else "not in the data"),
    ]


# --- tuning ----------------------------------------------------------------------------------------------------------


def _chosen(found: Mapping[str, Any]) -> str:
    if found["chosen"] is None:
        return "all failed; published settings"
    return _settings(found["tries"][found["chosen"]]["settings"]) or "the published settings"


def _tries(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            "✓" if at == found["chosen"] else "",
            _settings(each["settings"]) or "published",
            *(
                (f"{each['retention_raw']:.3f}", f"{each['alpha']:.2f}", f"{each['left']:.3f}")
                if "left" in each
                else (f"failed: {each['error']}", "", "")
            ),
        )
        for at, each in enumerate(found["tries"])
    ]


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


# --- the script ------------------------------------------------------------------------------------------------------


def _data(results: Results) -> str:
    """What the script needs, safe inside a script element."""
    names = ("forget_rouge", "keep_rouge")
    rows = [
        {
            "label": row["label"],
            "kind": row["kind"],
            "figures": {name: row["figures"][name]["mean"] for name in names},
        }
        for row in results["rows"]
    ]
    text = json.dumps({"rows": rows, "answers": results["answers"]}, ensure_ascii=False, separators=(",", ":"))
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")
