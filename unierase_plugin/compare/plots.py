"""Pictures for a paper: forgetting against retention with the frontier, curves over steps, cost. SVG and PNG."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..storage.atomic import write_bytes
from .summary import Row, frontier, value

logger = logging.getLogger(__name__)

#: Characters of a row's name that a picture has room for.
NAME = 28

COLOURS = {"editing": "#0969da", "training": "#bc4c00", "control": "#6e7781", "other": "#8250df"}
MARKS = {"editing": "o", "training": "s", "control": "D", "other": "^"}


def draw(results: Mapping[str, Any], out: Path) -> None:
    """Writes what there is to draw; nothing, with a warning, where the packages for it are not installed."""
    try:
        import adjustText  # noqa: F401
        import matplotlib
    except ImportError as error:
        logger.warning('No plots: %s (pip install "unierase-plugin[plots]"). The page has its own.', error)
        return
    # A text stays a text, and the same figures give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unierase", "font.size": 9}):
        rows = [row for row in results["rows"] if row["status"] != "failed"]
        _tradeoff(rows, out / "tradeoff")
        if any(row["curve"] for row in rows):
            _curves(rows, out / "steps")
        _cost(rows, out / "cost")


def _name(row: Row) -> str:
    label: str = row["label"]
    return label if len(label) <= NAME else f"{label[: NAME - 1]}…"


def _figure(width: float, height: float, panels: int) -> tuple[Any, Any]:
    """Without pyplot, which keeps figures in the process."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 160})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix[1:], **options)
        write_bytes(path.with_suffix(suffix), drawn.getvalue())


def _tradeoff(rows: Sequence[Row], path: Path) -> None:
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
        for row in rows:
            x, y = value(row, left), value(row, kept)
            if x is None or y is None:
                continue
            spreads = [row["figures"][key]["sd"] for key in (left, kept)]
            colour = COLOURS[row["kind"]]
            axis.errorbar(
                x, y, spreads[1], spreads[0], fmt=MARKS[row["kind"]], color=colour, markersize=5, elinewidth=0.8
            )
            texts.append(axis.text(x, y, _name(row), fontsize=7, color=colour))
        best = frontier([row for row in rows if row["kind"] != "control"], left, kept)
        points = sorted((value(row, left) or 0.0, value(row, kept) or 0.0) for row in best)
        axis.plot(*zip(*points, strict=True), color="#1a7f37", linewidth=1, zorder=0) if points else None
        axis.set(xlabel=f"left of the facts to forget ({title})", ylabel="kept, relative to before", title=title)
        axis.margins(0.12)
        axis.grid(alpha=0.25)
    # Where names are to go depends on where the layout puts the axes.
    figure.draw_without_rendering()
    for axis, texts in zip(axes, names, strict=True):
        places = [text.get_position() for text in texts]
        adjust_text(
            texts,
            [x for x, _ in places],
            [y for _, y in places],
            ax=axis,
            expand=(1.2, 1.8),
            # Steps, not seconds: the same figures are to give the same file.
            force_text=(0.3, 0.5),
            iter_lim=500,
            arrowprops={"arrowstyle": "-", "color": "#6e7781", "linewidth": 0.5},
        )
    _save(figure, path)


def _curves(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(10, 4, 2)
    for row in rows:
        steps = [point["step"] for point in row["curve"]]
        for axis, key in zip(axes, ("forget_rouge", "keep_rouge"), strict=True):
            points = [point[key]["mean"] for point in row["curve"]]
            if steps and None not in points:
                axis.plot(steps, points, marker="o", markersize=3, label=_name(row))
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="step", ylabel="ROUGE-L on the facts so far")
    axes[1].set(xlabel="step", ylabel="kept ROUGE-L, relative to before")
    axes[1].legend(fontsize=7)
    _save(figure, path)


def _cost(rows: Sequence[Row], path: Path) -> None:
    timed = [row for row in rows if value(row, "seconds")]
    if not timed:
        return
    figure, axes = _figure(10, 1 + 0.3 * len(timed), 2)
    for axis, key, title in ((axes[0], "seconds", "seconds"), (axes[1], "memory", "peak memory, GiB")):
        places, lengths = range(len(timed)), [value(row, key) or 0.0 for row in timed]
        axis.barh(places, lengths, color=[COLOURS[row["kind"]] for row in timed])
        axis.set_yticks(places, [_name(row) for row in timed])
        axis.invert_yaxis()
        axis.set(xlabel=title)
    _save(figure, path)
