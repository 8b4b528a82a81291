"""The comparison as one HTML page that needs nothing beside itself: figures, pictures, and every answer side by side.

Text, table and settings are in the HTML and need no script; sorting, filtering, pictures and the reading of answers are
`page.js`, which keeps what was chosen in the address, so that a view can be sent to somebody.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..storage.atomic import write_text
from .columns import Column, shown
from .tables import ARROWS, filled

Results = Mapping[str, Any]


def write_page(path: Path, results: Results) -> None:
    """Writes the page of a comparison as results.json holds it."""
    write_text(path, page(results))


def page(results: Results) -> str:
    """The HTML text."""
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Unlearning methods compared</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>\n{style}</style></head>\n<body>\n'
        f"<main>{''.join(_sections(results))}</main>\n"
        f'<script type="application/json" id="data">{_embedded(results)}</script>\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def _sections(results: Results) -> Iterable[str]:
    setup = results["setup"]
    yield f"<header><p class=kicker>Unlearning methods compared</p><h1>{escape(_short(setup['model']))}</h1></header>"
    yield _answer(results)
    yield _setting(results)
    yield _filters(results)
    yield _table(results)
    yield (
        '<section><h2 id="pictures">Forgetting against keeping</h2><p class=faint>Towards the upper left is better: '
        "less of the forgotten is left, more is kept. The line joins methods that no other beats on both. Bars are "
        'standard deviations.</p><div class="pictures"><figure id="by-rouge"></figure><figure id="by-prob"></figure>'
        '</div><div id="curves" class="pictures"></div><h2>Cost</h2><div id="costs"></div></section>'
    )
    yield (
        '<section><h2 id="answers">Read the answers</h2><p class=faint>What each method says to a question, beside the '
        "model before; words of the true answer are marked. Left and right keys step through the questions.</p>"
        '<div class="reader"><div class="controls"><select id="role" aria-label="set">'
        '<option value="forget">to forget</option><option value="keep">to keep</option></select>'
        '<button id="earlier" aria-label="earlier question">&lsaquo;</button>'
        '<select id="question" aria-label="question"></select>'
        '<button id="later" aria-label="later question">&rsaquo;</button></div><div id="reading"></div></div></section>'
    )
    yield _tuning(results)
    yield _methods(results)
    yield _meanings(results)


def _answer(results: Results) -> str:
    first, *others = results["answer"] or ["Nothing was compared."]
    rest = "".join(f"<li>{escape(sentence)}</li>" for sentence in others)
    return f'<div class="answer"><p>{escape(first)}</p><ul>{rest}</ul></div>'


def _setting(results: Results) -> str:
    setup, facts = results["setup"], results["setup"]["facts"]
    searched = [found for found in results["searches"].values() if found["tries"]]
    rows = {
        "Facts": f"{facts['forget']} to forget, {facts['keep']} to keep; reported {facts['forget_shown']} and "
        f"{facts['keep_shown']}",
        "Scenario": setup["scenario"] + (f", {setup['steps']} steps" if setup["scenario"] == "sequential" else ""),
        "Settings": f"best of {setup['budget']} tries each, for {len(searched)} of the methods"
        if searched
        else "as published or set by hand",
        "Seeds": ", ".join(map(str, setup["seeds"])),
        "Reference": _short(setup["reference"]) if setup["reference"] else "none",
        "Truth ratio": "the data has wrong answers" if setup["truth_ratio"]["forget"] else "not in the data",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items())
    return f"<dl class=setting>{items}</dl>"


def _short(name: str) -> str:
    return Path(name).name or name


def _filters(results: Results) -> str:
    boxes = "".join(
        f'<label class="chip {row["kind"]}"><input type="checkbox" data-label="{escape(row["label"], True)}" checked>'
        f"{escape(row['label'])}</label>"
        for row in results["rows"]
    )
    kinds = dict.fromkeys(row["kind"] for row in results["rows"])
    buttons = "".join(f'<button data-kind="{kind}">{kind}</button>' for kind in kinds)
    return (
        f'<nav id="filters"><span class=faint>Show</span><button data-kind="all">all</button>{buttons}'
        f'<div class="chips">{boxes}</div></nav>'
    )


# --- the table -------------------------------------------------------------------------------------------------------


def _table(results: Results) -> str:
    columns = filled(results)
    groups = list(dict.fromkeys(column.group for column in columns))
    top = "".join(
        f'<th colspan="{sum(column.group == group for column in columns)}" class="group">{escape(group)}</th>'
        for group in groups
    )
    head = "".join(
        f'<th class="n{_first(columns, at)}" aria-sort="none"><button data-sort="{column.key}" '
        f'title="{escape(column.meaning, True)}">{escape(column.title)} <i>{ARROWS[column.better]}</i></button></th>'
        for at, column in enumerate(columns)
    )
    body = "".join(_row(row, columns) for row in results["rows"])
    return (
        '<section><h2 id="table">All figures</h2><p class=faint>Click a heading to sort. ↓ and ↑ say which way is '
        "better. No column is the ranking, the composites least of all: a collapsed model scores well on FE.</p>"
        f'<div class="scroll"><table id="rows"><thead><tr><th></th>{top}</tr><tr><th class="name" aria-sort="none">'
        f'<button data-sort="label">method</button></th>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div></section>"
    )


def _first(columns: Sequence[Column], at: int) -> str:
    return " first" if at == 0 or columns[at - 1].group != columns[at].group else ""


def _row(row: Mapping[str, Any], columns: Sequence[Column]) -> str:
    name = (
        f'<th class="name" scope="row" title="{escape(row["label"], True)}"><span class="dot {row["kind"]}"></span>'
        f"{escape(row['label'])}"
        f"{'<small> partly failed</small>' if row['status'] == 'failed in part' else ''}</th>"
    )
    attributes = f'data-label="{escape(row["label"], True)}" data-kind="{row["kind"]}"'
    if row["status"] == "failed":
        failure = row["failures"][0]
        text = f"<b>failed: {escape(failure['kind'])}</b> {escape(failure['error'])}"
        return f'<tr {attributes} class="failed">{name}<td colspan="{len(columns)}" class="first">{text}</td></tr>'
    cells = []
    for at, column in enumerate(columns):
        figure = row["figures"][column.key]
        spread = f"<small>±{shown(column, figure['sd'])}</small>" if figure["sd"] is not None else ""
        number = "" if figure["mean"] is None else f' data-value="{figure["mean"]!r}"'
        cells.append(f'<td class="n{_first(columns, at)}"{number}>{shown(column, figure["mean"])}{spread}</td>')
    return f"<tr {attributes}>{name}{''.join(cells)}</tr>"


# --- how it was made -------------------------------------------------------------------------------------------------


def _tuning(results: Results) -> str:
    setup, searches = results["setup"], results["searches"]
    if not searches:
        return (
            "<section><h2>Tuning</h2><p>None: every method has its published settings, or those set by hand. "
            f"{_matching(setup)}</p></section>"
        )
    parts = [_search(label, found, setup["target"]) for label, found in searches.items()]
    rule = next(iter(searches.values()))["rule"]
    return (
        f"<section><h2>Tuning</h2><p>The same budget for every method: {setup['budget']} tries at most, the published "
        f"settings first, the others drawn from the space below. {escape(rule)} Chosen on "
        f"{setup['facts']['forget_validation']} facts to forget and {setup['facts']['keep_validation']} to keep, which "
        f"are not among those reported. {_matching(setup)}</p>{''.join(parts)}</section>"
    )


def _matching(setup: Mapping[str, Any]) -> str:
    if not setup["bisections"]:
        return ""
    return (
        f"At equal retention: the change of weights is scaled down until {setup['target']:g} of before is kept on "
        "validation facts (Wang et al. 2025), and forgetting is read there."
    )


def _search(label: str, found: Mapping[str, Any], target: float) -> str:
    if not found["tries"]:
        return f"<details><summary>{escape(label)}: nothing to search</summary></details>"
    rows = [
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
    space = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in found["space"].items())
    chosen = found["tries"][found["chosen"]]["settings"] if found["chosen"] is not None else None
    taken = "all failed; published settings" if chosen is None else _settings(chosen) or "the published settings"
    heads = ["", "settings", "kept", f"alpha at which {target:g} is kept", "left there (less is better)"]
    return (
        f"<details><summary>{escape(label)}: {escape(taken)}</summary><p class=faint>Space: {escape(space)}</p>"
        f"{_plain_table(heads, rows)}</details>"
    )


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


def _methods(results: Results) -> str:
    parts = []
    for row in results["rows"]:
        notes = [
            f"At equal retention: {row['not_matched']}." if row["not_matched"] else "",
            "It was interrupted, so that its time is too short." if row["interrupted"] else "",
            f"Audit: {row['audit']['verdict']}" if row["audit"] else "",
            *(f"Seed {each['seed']} failed: {each['error']}" for each in row["failures"]),
        ]
        settings = _plain_table([], [(name, str(value)) for name, value in row["settings"].items()])
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in row["phases"].items())
        text = "".join(f"<p>{escape(note)}</p>" for note in notes if note)
        parts.append(
            f"<details><summary><b>{escape(row['label'])}</b> {escape(row['title'])}</summary><p class=faint>"
            f"{escape(row['paper'])}{f'; {escape(phases)}' if phases else ''}</p>{text}{settings}</details>"
        )
    return f"<section><h2>Methods and their settings</h2>{''.join(parts)}</section>"


def _meanings(results: Results) -> str:
    rows = [(column.title, f"{column.meaning} ({column.group.lower()})") for column in filled(results)]
    return f"<section><h2>What the figures mean</h2>{_plain_table([], rows)}</section>"


def _plain_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(text))}</td>' for text in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class=plain>{top}{body}</table></div>'


def _embedded(results: Results) -> str:
    """What the script needs, safe inside a script element."""
    rows = [
        {
            "label": row["label"],
            "kind": row["kind"],
            "curve": row["curve"],
            "failed": row["status"] == "failed",
            "figures": {key: [figure["mean"], figure["sd"]] for key, figure in row["figures"].items()},
        }
        for row in results["rows"]
    ]
    text = json.dumps({"rows": rows, "answers": results["answers"]}, ensure_ascii=False, separators=(",", ":"))
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")
