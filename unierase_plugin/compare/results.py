"""Turns the stages of all runs into rows: means and standard deviations over seeds, curves, and failures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plugins.registration import registry
from ..storage.atomic import write_json, write_text
from ..storage.fingerprints import plain
from ..version import __version__
from .columns import COLUMNS, Column, columns_of
from .entries import REFERENCE, UNEDITED, Entry
from .page import write_page
from .plots import draw
from .stages import FAILED, MethodRun, Stages, read_json
from .summary import answer
from .tables import markdown, tex

#: Version of results.json's schema (docs/how-to/compare.md).
SCHEMA = 1

#: Figures that are shown over the steps of the sequential scenario.
CURVES = ("forget_rouge", "forget_prob", "keep_rouge", "keep_prob")

#: Stages that rows are made of.
_READ = ("method", "raw", "utility", "matched", "audit")


def gather(
    out: Path,
    described: Mapping[str, Any],
    runs: Sequence[tuple[Entry, MethodRun, Path]],
    searches: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the tables, plots and page of the runs, and returns what results.json holds."""
    found = [(entry, run, _stages(folder)) for entry, run, folder in runs]
    before = next(stages for entry, _, stages in found if entry.method == UNEDITED)
    columns = columns_of(described.get("metrics", ()))
    labels = list(dict.fromkeys(entry.label for entry, _, _ in found))
    rows = [_row([each for each in found if each[0].label == label], before, searches, columns) for label in labels]
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "setup": dict(described),
        "answer": [],
        "rows": rows,
        "searches": dict(searches),
        "columns": [
            {name: getattr(c, name) for name in ("key", "title", "meaning", "group", "better", "digits")}
            for c in columns
        ],
        "answers": _answers(found),
    }
    results["answer"] = answer(results)
    results = plain(results)
    write_json(out / "results.json", results)
    write_text(out / "table.md", markdown(results))
    write_text(out / "table.tex", tex(results))
    write_page(out / "report.html", results, draw(results, out))
    return results


def _stages(folder: Path) -> dict[str, Any]:
    stages = Stages(folder)
    names = [*_READ, *sorted((each.stem for each in folder.glob("step-*.json")), key=_number)]
    return {**{name: stages[name] for name in names}, "failed": read_json(folder / FAILED)}


def _number(stem: str) -> int:
    return int(stem.split("-")[1])


def _row(
    found: Sequence[tuple[Entry, MethodRun, dict[str, Any]]],
    before: dict[str, Any],
    searches: Any,
    columns: Sequence[Column],
) -> dict[str, Any]:
    entry, run, _ = found[0]
    worked = [stages for _, _, stages in found if stages["failed"] is None]
    failed = [{"seed": run.seed, **stages["failed"]} for _, run, stages in found if stages["failed"] is not None]
    cost: dict[str, Any] = next((stages["method"] for stages in worked if stages["method"]), {})
    method = registry().methods.get(entry.method)
    why = next((stages["matched"]["why"] for stages in worked if (stages["matched"] or {}).get("why")), None)
    return {
        "label": entry.label,
        "method": entry.method,
        "kind": _kind(entry),
        "title": method.title if method else "the model that never saw the facts",
        "paper": method.paper if method else "control",
        "set_by_hand": dict(entry.changes),
        "tuned": dict(run.tried) if entry.label in searches else None,
        "settings": cost.get("settings", {}),
        "phases": cost.get("phases", {}),
        "status": "ok" if not failed else "failed" if not worked else "failed in part",
        "failures": failed,
        "seeds": [run.seed for _, run, _ in found],
        "interrupted": any((stages["method"] or {}).get("interrupted") for stages in worked),
        "device": cost.get("device"),
        "not_matched": why,
        "figures": {column.key: _spread([column.read(stages, before) for stages in worked]) for column in columns},
        "curve": _curve(worked, before),
        "audit": next((stages["audit"] for stages in worked if stages["audit"]), None),
        "tried_alpha": next((stages["matched"].get("tried") for stages in worked if stages["matched"]), None),
    }


def _kind(entry: Entry) -> str:
    """The kind of a row: control, editing, training or other. The class of the method's settings tells it."""
    from ..hparams import RemovalSettings
    from ..methods.finetuning.settings import TrainingHyperParams
    from ..methods.lunar import LUNARHyperParams

    if entry.is_control or entry.method == REFERENCE:
        return "control"
    kind = registry().methods.find(entry.method).hparams
    if issubclass(kind, (TrainingHyperParams, LUNARHyperParams)):
        return "training"
    return "editing" if issubclass(kind, RemovalSettings) else "other"


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds that have the figure. One seed has no deviation."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def _curve(worked: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is left of the facts so far, and what is kept, after each step of the sequential scenario."""
    names = list(
        dict.fromkeys(
            name for stages in worked for name in stages if name.startswith("step-") and not name.endswith("-method")
        )
    )
    columns = {column.key: column.read for column in COLUMNS if column.key in CURVES}
    return [
        {
            "step": _number(name),
            **{
                key: _spread([read({"raw": stages.get(name)}, before) for stages in worked])
                for key, read in columns.items()
            },
        }
        for name in names
    ]


def _answers(found: Sequence[tuple[Entry, MethodRun, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Every question, and the answers of each row's first seed: of the whole edit, and at equal retention."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    seen: set[str] = set()
    for entry, _, stages in found:
        if entry.label in seen or stages["failed"] is not None:
            continue
        seen.add(entry.label)
        for stage in ("raw", "matched"):
            samples = (stages[stage] or {}).get("samples") or {}
            for role, each in ((name, each) for name in samples for each in samples[name]):
                row = table.setdefault(
                    (role, each["question"]),
                    {
                        "role": role,
                        "question": each["question"],
                        "answer": each["answer"],
                        "said": {},
                        "matched": {},
                    },
                )
                row["said" if stage == "raw" else "matched"][entry.label] = {
                    "text": each["said"],
                    "rouge": each.get("rougeL_recall"),
                    "prob": each.get("prob"),
                }
    return list(table.values())
