"""The charts of a comparison, as SVG and PNG files and for the page.

There are three: forgetting against keeping, with the frontier; curves over steps; cost.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..storage.atomic import write_bytes
from .summary import Row, frontier, value

logger = logging.getLogger(__name__)

#: Characters of a row's name that a chart has room for.
NAME = 28

INK, PAPER, GRID, FAINT, FRONTIER = "#1b1f24", "#ffffff", "#d8dee4", "#59636e", "#1a7f37"
COLOURS = {"editing": "#0969da", "training": "#bc4c00", "control": "#6e7781", "other": "#8250df"}
MARKS = {"editing": "o", "training": "s", "control": "D", "other": "^"}
#: Names of these colours in page.css, which has another set of them for dark mode.
VARIABLES = {**COLOURS, "ink": INK, "page": PAPER, "line": GRID, "faint": FAINT, "good": FRONTIER}


def draw(results: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Writes the charts, and returns the SVG texts by name.

    It draws nothing, and warns, if the packages for it are not installed.
    """
    try:
        import adjustText  # noqa: F401
        import matplotlib
    except ImportError as error:
        logger.warning('There are no charts: %s. Install them with: pip install "unierase-plugin[plots]"', error)
        return {}
    settings: Any = {
        # Text stays text, and the same figures give the same file.
        "svg.fonttype": "none",
        "svg.hashsalt": "unierase",
        "font.size": 9,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "grid.color": GRID,
        "legend.edgecolor": GRID,
    }
    with matplotlib.rc_context(settings):
        # The number of a row in the results names its parts of a chart.
        rows = [(at, row) for at, row in enumerate(results["rows"]) if row["status"] != "failed"]
        charts = {"tradeoff": _tradeoff(rows), "steps": _curves(rows), "cost": _cost(rows)}
        return {name: _save(figure, out / name) for name, figure in charts.items() if figure is not None}


def embedded(svg: str) -> str:
    """The chart as an element of a page: without prolog and metadata, and with the page's colours."""
    text = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for name, colour in VARIABLES.items():
        text = text.replace(f": {colour}", f": var(--{name})")
    return text


Rows = Sequence[tuple[int, Row]]


def _name(row: Row) -> str:
    label: str = row["label"]
    return label if len(label) <= NAME else f"{label[: NAME - 1]}…"


def _mark(at: int, parts: Iterable[Any]) -> None:
    """Marks the parts of a chart that belong to a row, so that the page can hide them."""
    for number, part in enumerate(parts):
        part.set_gid(f"row-{at}-{number}-{type(part).__name__}")


def _figure(width: float, height: float, panels: int) -> tuple[Any, Any]:
    """A figure without pyplot, which would keep it in the process."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, path: Path) -> str:
    """Writes the figure as SVG and PNG, and returns the SVG text."""
    texts = {}
    for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 160})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix[1:], **options)
        texts[suffix] = drawn.getvalue()
        write_bytes(path.with_suffix(suffix), texts[suffix])
    return texts[".svg"].decode()


def _tradeoff(rows: Rows) -> Any:
    from adjustText import adjust_text

    figure, axes = _figure(10, 4.4, 2)
    names: list[list[Any]] = [[], []]
    for axis, texts, (left, kept, title) in zip(
        axes,
        names,
        (
            ("forget_rouge", "keep_rouge", "ROUGE-L recall"),
            ("forget_prob", "keep_prob", "probability"),
        ),
        strict=True,
    ):
        for at, row in rows:
            x, y = value(row, left), value(row, kept)
            if x is None or y is None:
                continue
            spreads = [row["figures"][key]["sd"] for key in (left, kept)]
            colour = COLOURS[row["kind"]]
            drawn = axis.errorbar(
                x, y, spreads[1], spreads[0], fmt=MARKS[row["kind"]], color=colour, markersize=5, elinewidth=0.8
            )
            texts.append(axis.text(x, y, _name(row), fontsize=7, color=colour))
            _mark(at, (*drawn.get_children(), texts[-1]))
        best = frontier([row for _, row in rows if row["kind"] != "control"], left, kept)
        points = sorted((value(row, left) or 0.0, value(row, kept) or 0.0) for row in best)
        axis.plot(*zip(*points, strict=True), color=FRONTIER, linewidth=1, zorder=0) if points else None
        axis.set(xlabel=f"left of the facts to forget ({title})", ylabel="kept, relative to before", title=title)
        axis.margins(0.12)
        axis.grid()
    # The layout must place the axes before the names can be placed.
    figure.draw_without_rendering()
    for axis, texts in zip(axes, names, strict=True):
        if not texts:  # no method has both figures, for example because nothing was kept before
            continue
        places = [text.get_position() for text in texts]
        _, lines = adjust_text(
            texts,
            [x for x, _ in places],
            [y for _, y in places],
            ax=axis,
            expand=(1.2, 1.8),
            # A limit of steps, not of seconds, so that the same figures give the same file.
            force_text=(0.3, 0.5),
            iter_lim=500,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.5},
        )
        for number, line in enumerate(lines):
            line.set_gid(f"name-line-{number}")
    return figure


def _curves(rows: Rows) -> Any:
    from matplotlib.ticker import MaxNLocator

    if not any(row["curve"] for _, row in rows):
        return None
    figure, axes = _figure(10, 4, 2)
    for axis, key in zip(axes, ("forget_rouge", "keep_rouge"), strict=True):
        shown = []
        for at, row in rows:
            steps = [point["step"] for point in row["curve"]]
            points = [point[key]["mean"] for point in row["curve"]]
            if steps and None not in points:
                _mark(at, axis.plot(steps, points, marker="o", markersize=3, label=_name(row)))
                shown.append(at)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis is axes[1] and shown:
            legend = axis.legend(fontsize=7)
            for at, line, text in zip(shown, legend.get_lines(), legend.get_texts(), strict=True):
                line.set_gid(f"row-{at}-legend-line")
                text.set_gid(f"row-{at}-legend-text")
    axes[0].set(xlabel="step", ylabel="ROUGE-L on the facts so far")
    axes[1].set(xlabel="step", ylabel="kept ROUGE-L, relative to before")
    return figure


def _cost(rows: Rows) -> Any:
    timed = [(at, row) for at, row in rows if value(row, "seconds")]
    if not timed:
        return None
    figure, axes = _figure(10, 1 + 0.3 * len(timed), 2)
    charts = (("seconds", "seconds", "%.1f"), ("memory", "peak memory, GiB", "%.2f"))
    for axis, (key, title, form) in zip(axes, charts, strict=True):
        places, lengths = range(len(timed)), [value(row, key) or 0.0 for _, row in timed]
        bars = axis.barh(places, lengths, color=[COLOURS[row["kind"]] for _, row in timed])
        numbers = axis.bar_label(bars, fmt=form, padding=3, fontsize=7, color=FAINT)
        axis.set_yticks(places, [_name(row) for _, row in timed])
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.set(xlabel=title)
        for (at, _), parts in zip(timed, zip(bars, numbers, axis.get_yticklabels(), strict=True), strict=True):
            _mark(at, parts)
    return figure
