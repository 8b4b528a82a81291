"""The rows as tables for a README (Markdown) and for a paper (LaTeX)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .columns import Column, columns_of, shown

ARROWS = {1: "↑", -1: "↓", 0: ""}


def cell(column: Column, figure: Mapping[str, Any], plus_minus: str = " ± ") -> str:
    """The mean, with the standard deviation over several seeds."""
    text = shown(column, figure["mean"])
    return text if figure["sd"] is None else f"{text}{plus_minus}{shown(column, figure['sd'])}"


def filled(results: Mapping[str, Any]) -> list[Column]:
    """The columns for which some row has a figure, in their order. The composites are last."""
    columns = columns_of(results["setup"].get("metrics", ()))
    return [
        column for column in columns if any(row["figures"][column.key]["mean"] is not None for row in results["rows"])
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """One table for each group of figures, with one method a line, in the order of the command."""
    columns = filled(results)
    groups = list(dict.fromkeys(column.group for column in columns))
    parts = [*(f"- {sentence}" for sentence in results["answer"]), ""]
    for group in groups:
        own = [column for column in columns if column.group == group]
        head = ["method", *(f"{column.title} {ARROWS[column.better]}".strip() for column in own)]
        lines = [head, ["---"] * len(head)]
        for row in results["rows"]:
            failed = row["status"] == "failed"
            figures = [
                f"failed: {row['failures'][0]['kind']}" if failed else cell(c, row["figures"][c.key]) for c in own
            ]
            lines.append([f"`{row['label']}`", *figures])
        parts += [f"**{group}**", "", *(f"| {' | '.join(line)} |" for line in lines), ""]
    parts += [f"- {column.title} ({column.group.lower()}): {column.meaning}" for column in columns]
    return "\n".join(parts) + "\n"


def tex(results: Mapping[str, Any]) -> str:
    """A booktabs table. The best figure of a column is not marked, since no column is the ranking."""
    columns = filled(results)
    groups = list(dict.fromkeys(column.group for column in columns))
    spans = [(group, sum(column.group == group for column in columns)) for group in groups]
    top = " & ".join(["", *(rf"\multicolumn{{{span}}}{{c}}{{{_escaped(group)}}}" for group, span in spans)])
    rules, at = [], 2
    for _, span in spans:
        rules.append(rf"\cmidrule(lr){{{at}-{at + span - 1}}}")
        at += span
    arrows = {1: r"$\uparrow$", -1: r"$\downarrow$", 0: ""}
    head = " & ".join(["Method", *(f"{_escaped(column.title)} {arrows[column.better]}".strip() for column in columns)])
    lines = [_tex_row(row, columns) for row in results["rows"]]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            rf"{top} \\",
            "".join(rules),
            rf"{head} \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _tex_row(row: Mapping[str, Any], columns: Sequence[Column]) -> str:
    name = _escaped(row["label"])
    if row["status"] == "failed":
        return rf"{name} & \multicolumn{{{len(columns)}}}{{l}}{{failed: {_escaped(row['failures'][0]['kind'])}}} \\"
    return " & ".join([name, *(cell(column, row["figures"][column.key], r" $\pm$ ") for column in columns)]) + r" \\"


def _escaped(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
