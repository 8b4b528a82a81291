"""The answer of a comparison in sentences. They say no more than the figures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def answer(results: Mapping[str, Any]) -> list[str]:
    """The sentences, the most important one first."""
    rows = [row for row in results["rows"] if row["kind"] != "control" and row["status"] != "failed"]
    target = results["setup"]["target"]
    return [
        *_matched(rows, target),
        *_raw(rows, target),
        *_token(rows),
        *_time(rows),
        *_failed(results["rows"]),
        *_limits(results),
    ]


def value(row: Row, key: str) -> float | None:
    """The mean of one figure over a row's seeds; None if it was not measured."""
    found: float | None = row["figures"][key]["mean"]
    return found


def frontier(rows: Sequence[Row], left: str, kept: str) -> list[Row]:
    """The rows that no other row beats on one figure without being worse on the other."""
    known = [(row, value(row, left), value(row, kept)) for row in rows]
    points = [(row, x, y) for row, x, y in known if x is not None and y is not None]
    return [row for row, x, y in points if not any((a <= x and b >= y) and (a < x or b > y) for _, a, b in points)]


def _matched(rows: Sequence[Row], target: float) -> list[str]:
    found = []
    for key, words in (
        ("matched_rouge", "says least of the forgotten answers"),
        ("matched_prob", "gives the forgotten answers the least probability"),
    ):
        ranked = sorted((row for row in rows if value(row, key) is not None), key=lambda row: value(row, key) or 0.0)
        if ranked:
            figure = "ROUGE-L" if key == "matched_rouge" else "probability"
            others = f"; next {_listed(ranked[1:3], key)}" if ranked[1:] else ""
            found.append(
                f"At equal retention ({target:g} of before), {_listed(ranked[:1], key, figure)} {words}{others}."
            )
    return found


def _raw(rows: Sequence[Row], target: float) -> list[str]:
    best = frontier(rows, "forget_rouge", "keep_rouge")
    if not best:
        return []
    named = ", ".join(
        f"{row['label']} (says {_shown(row, 'forget_rouge')} of the forgotten, keeps {_shown(row, 'keep_rouge')})"
        for row in sorted(best, key=lambda row: value(row, "forget_rouge") or 0.0)
    )
    lost = [row["label"] for row in rows if (kept := value(row, "keep_rouge")) is not None and kept < target]
    more = f" These keep less than {target:g} of before: {', '.join(lost)}." if lost else ""
    return [f"By ROUGE-L of the whole edit, no method beats these on both forgetting and keeping: {named}.{more}"]


def _token(rows: Sequence[Row]) -> list[str]:
    """Compares the token with plain sentences on the same engine."""
    by_label = {row["label"]: row for row in rows}
    found = []
    for method in ("memit", "alphaedit", "rome"):
        token, plain = (by_label.get(f"{method}:{target}") for target in ("token", "idk"))
        plain = plain or by_label.get(method)
        if token and plain:
            found.append(
                f"What the token adds on {method}: ROUGE-L on the forgotten {_shown(plain, 'forget_rouge')} with plain "
                f"sentences, {_shown(token, 'forget_rouge')} with the token; kept {_shown(plain, 'keep_rouge')} and "
                f"{_shown(token, 'keep_rouge')}; says it does not know "
                f"{_shown(plain, 'idk')} and {_shown(token, 'idk')}."
            )
    return found


def _time(rows: Sequence[Row]) -> list[str]:
    timed = sorted((row for row in rows if value(row, "seconds")), key=lambda row: value(row, "seconds") or 0.0)
    if len(timed) < 2:
        return []
    devices = sorted({row["device"] for row in timed if row["device"]})
    if len(devices) > 1:
        return [f"Do not compare the times: they are from different machines ({'; '.join(devices)})."]
    trained = [row for row in timed if row["kind"] == "training"]
    first, last = (f"{_shown(row, 'seconds')} s ({row['label']})" for row in (timed[0], timed[-1]))
    text = f"Time runs from {first} to {last}."
    ours = next((row for row in timed if row["method"] == "unierase"), None)
    if ours and trained:
        ratio = (value(ours, "seconds") or 0.0) / (value(trained[0], "seconds") or 1.0)
        text += f" {ours['label']} takes {ratio:.2g} times as long as the quickest training ({trained[0]['label']})."
    return [text]


def _failed(rows: Sequence[Row]) -> list[str]:
    failed = [f"{row['label']} ({row['failures'][0]['kind']})" for row in rows if row["failures"]]
    return [f"Failed, for all seeds or some: {', '.join(failed)}."] if failed else []


def _limits(results: Mapping[str, Any]) -> list[str]:
    setup = results["setup"]
    found = []
    if len(setup["seeds"]) < 2:
        found.append("One seed: there is no spread to compare differences between methods with.")
    if not setup["reference"]:
        found.append(
            "There is no reference model that never saw the facts, so it is not known how little should be left."
        )
    if not any(search["tries"] for search in results["searches"].values()):
        found.append(
            "Nothing was tuned: the settings are published ones, for other models and sizes, or were set by hand."
        )
    return found


def _shown(row: Row, key: str) -> str:
    figure = row["figures"][key]
    if figure["mean"] is None:
        return "-"
    digits = 0 if key == "seconds" else 2
    spread = f" ± {figure['sd']:.{digits}f}" if figure["sd"] is not None else ""
    return f"{figure['mean']:.{digits}f}{spread}"


def _listed(rows: Sequence[Row], key: str, figure: str = "") -> str:
    return ", ".join(f"{row['label']} ({figure}{' ' if figure else ''}{_shown(row, key)})" for row in rows)
