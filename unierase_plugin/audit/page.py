"""The audit as one HTML page that needs no other file. It is readable in light and in dark mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..storage.atomic import write_text
from ..storage.html import render

Report = Mapping[str, Any]

#: The words before the attacks in a verdict.
RECOVERABLE = "ecoverable by: "

#: Order and colour class of the models in every chart.
ROLES = ("edited", "unedited", "reference")
LONGEST_TEXT = 600


def write_page(path: Path, report: Report) -> None:
    """Writes the page of a report as audit.json holds it."""
    write_text(path, page(report))


def page(report: Report) -> str:
    """Returns the HTML text: what was not run, the verdict, a bar for each attack, and examples."""
    here = Path(__file__).parent
    filters: dict[str, Callable[..., Any]] = {
        "clamped": _clamped,
        "percent": lambda share: f"{100 * _clamped(share):.1f}%",
        "shortened": lambda text: text if len(text) <= LONGEST_TEXT else f"… {text[-LONGEST_TEXT:]}",
        "variants": _variants,
        "curves": lambda entry: list(_curves(entry)),
        "figures": lambda entry: list(_figures(entry["figures"])),
    }
    return render(
        here / "page.html.j2",
        filters,
        report=report,
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        roles=ROLES,
        verdict=_verdict(report["verdict"]),
        setting=_setting(report),
        damage=[_damage(each) for each in report["damage"]],
    )


def _clamped(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def _verdict(text: str) -> dict[str, Any]:
    """The verdict's word, its class, the sentence after it, and the attacks that it lists."""
    word = next(word for word in ("removed", "suppressed", "not forgotten", "model damaged") if text.startswith(word))
    said, _, by = text[len(word) :].partition(RECOVERABLE)
    attacks = [each.rstrip(".") for each in by.split("; ")] if by else []
    kind = {"removed": "removed", "model damaged": "damaged", "not forgotten": "not"}.get(word, "")
    return {"word": word, "kind": kind, "said": said + (RECOVERABLE if attacks else ""), "attacks": attacks}


def _setting(report: Report) -> list[tuple[str, str]]:
    sizes = report["sizes"]["name"]
    return [
        ("unedited model", report["unedited"]),
        ("reference model", report["reference"] or "none"),
        ("method", report["method"] or "unknown"),
        ("unlearning token", report["token"] or "none"),
        (
            "facts audited",
            f"{report['n_audited']} of {report['n_forget']} to forget, "
            f"{report['n_kept_audited']} of {report['n_kept']} to keep",
        ),
        ("sizes and seed", f"{sizes}, seed {report['seed']}, prompts in {report['form']} form"),
    ]


def _damage(found: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        found["name"],
        _number(found["value"]),
        f"{_number(found['low'])} to {_number(found['high'])}",
        str(found["n"]),
        found["limit"],
        "beyond the limit" if found["beyond"] else "not shown to be beyond it",
    )


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, (int, float)) else str(value)


def _variants(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The mean of each variant by model; None for an attack of one variant."""
    variants: Mapping[str, Sequence[Mapping[str, Any]]] = entry["variants"]
    roles = [role for role in ROLES if variants.get(role)]
    names = dict.fromkeys(each["name"] for role in roles for each in variants[role])
    if len(names) < 2:
        return None
    means = {role: {each["name"]: each["mean"] for each in variants[role]} for role in roles}
    rows = [(name, *(_number(means[role].get(name)) for role in roles)) for name in names]
    return {"head": ["variant", *roles], "rows": rows}


def _figures(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each figure as a table of key and model, or as charts of curves by block. Texts are in audit.json alone."""
    names = dict.fromkeys(name for by_name in figures.values() for name in by_name if name != "examples")
    for name in names:
        title = name.replace("_", " ")
        found = {role: figures[role].get(name) for role in ROLES if role in figures}
        by_role = {role: value for role, value in found.items() if value not in (None, {})}
        if not by_role:
            continue
        first = next(iter(by_role.values()))
        if isinstance(first, Mapping) and all(isinstance(value, list) for value in first.values()):
            charts = [
                _chart(f"{title}, {key}", {role: list(enumerate(value[key])) for role, value in by_role.items()})
                for key in first
            ]
            yield {"title": title, "charts": [chart for chart in charts if chart], "rows": []}
            continue
        rows = []
        for key in first if isinstance(first, Mapping) else [title]:
            values = [value.get(key) if isinstance(value, Mapping) else value for value in by_role.values()]
            rows.append((key, *(_flat(value) for value in values)))
        yield {"title": title, "charts": [], "head": ["", *by_role], "rows": rows}


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_number(each)}" for key, each in value.items())
    return _number(value)


# --- charts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LineChart:
    """A small chart of one line for each model."""

    title: str
    #: (role, points as SVG writes them).
    lines: list[tuple[str, str]]
    most_x: float
    least_y: float
    most_y: float
    width: int = 420
    height: int = 150
    left: int = 34
    base: int = 130


def _curves(entry: Mapping[str, Any]) -> Iterator[LineChart]:
    """Recovery by training steps: one chart for each set of trained weights."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for role, variants in entry["variants"].items():
        for each in variants:
            if each["curve"] and each["mean"] is not None:
                name, steps = each["curve"]
                lines.setdefault(name, {}).setdefault(role, []).append((steps, each["mean"]))
    for name, by_role in lines.items():
        if any(len(points) > 1 for points in by_role.values()):
            chart = _chart(f"{name}: share answered by steps", by_role)
            if chart is not None:
                yield chart


def _chart(title: str, lines: Mapping[str, Sequence[tuple[float, Any]]]) -> LineChart | None:
    """The y axis runs from 0 to 1, or as far as the values do. None if there are no values."""
    points = [(x, y) for line in lines.values() for x, y in line if y is not None]
    if not points:
        return None
    chart = LineChart(
        title=title,
        lines=[],
        most_x=max(max(x for x, _ in points), 1),
        least_y=min(0.0, *(y for _, y in points)),
        most_y=max(1.0, *(y for _, y in points)),
    )
    across = (chart.width - chart.left - 8) / chart.most_x
    up = (chart.base - 10) / (chart.most_y - chart.least_y)
    for role, line in lines.items():
        places = (
            f"{chart.left + across * x:.1f},{chart.base - up * (y - chart.least_y):.1f}"
            for x, y in line
            if y is not None
        )
        chart.lines.append((role, " ".join(places)))
    return chart
