"""Commands that read or rewrite the record of an edited folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import UniEraseError
from .console import Overwrite, Screen, our_log

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

Folder = Annotated[Path, typer.Argument(help="A folder that `unierase run` wrote.")]

#: How many digits of a request's hash are shown. They can be given to name the request.
SHOWN = 12


def revert(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Folder for the restored model.")],
    step: Annotated[
        int | None, typer.Option(help="Steps to keep; 0, the default, gives the base model to the bit.")
    ] = None,
    request: Annotated[
        list[str] | None,
        typer.Option(
            help="Take this request back and keep all others: its question, its case_id, or the first digits "
            "of its hash (see `unierase inspect DIR --requests`). May be given several times."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Takes an edit back: all of it and exactly, the last steps, or single requests.

    A request is taken out by solving its step again without it, from the keys in the record. In the lowest edited
    block this is exact. The blocks above keep what was measured while the request was in place.
    """
    from ..checkpoint import revert_checkpoint, take_back_requests

    if request and step is not None:
        raise UniEraseError(
            f"--step {step} and --request cannot be combined. Revert the steps first, then the requests."
        )
    console = Screen()
    with our_log(console):
        if request:
            written = take_back_requests(folder, out, request, overwrite)
        else:
            written = revert_checkpoint(folder, out, overwrite, step or 0)
    console.print(f"Written: {written}", soft_wrap=True)


def export(
    folder: Folder,
    adapter: Annotated[Path, typer.Option(help="Folder for a PEFT adapter: LoRA matrices and the token's rows.")],
    step: Annotated[int | None, typer.Option(help="Export only this many first steps. Default: all steps.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Writes the edit as a PEFT adapter for the unchanged base model. It can be attached, detached or merged.

    The folder's README.md has the code that loads it. Loading needs peft 0.18 or later (pip install
    'unierase-plugin[peft]'); writing does not.
    """
    from ..checkpoint import export_adapter

    console = Screen()
    with our_log(console):
        written = export_adapter(folder, adapter, overwrite, step)
    console.print(f"Written: {written}", soft_wrap=True)


def inspect(
    folder: Folder,
    requests: Annotated[bool, typer.Option("--requests", help="Show one line for each request too.")] = False,
    holds: Annotated[
        str, typer.Option(help="Say which step forgot this question. The exit status is 1 if none did.")
    ] = "",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Check the whole folder with its weights. The exit status is 1 if something is damaged."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Shows the edits of a model: steps, requests, and measurements.

    The record keeps requests as salted hashes, and the first digits of these are shown. With --keep-requests, a run
    keeps the texts too. To ask whether a question was forgotten, use --holds.
    """
    from ..checkpoint import examine, step_summaries

    console = Screen()
    if verify:
        _verify(console, folder, as_json)
        return
    found = examine(folder).up_to()
    if holds:
        _tell_whether(console, holds, found.find(holds), as_json)
    elif as_json:
        parts = {"manifest": found.manifest, "report": found.report, "requests": found.ledger}
        console.json({**parts, "steps": step_summaries(found)})
    else:
        steps = step_summaries(found)
        console.print(_steps_table(steps, f"{folder!s}, from {found.manifest['model']}"))
        if any(entry["report"] for entry in steps):
            console.print(_figures_table(steps))
        if requests:
            console.print(_requests_table(found))


def _verify(console: Screen, folder: Path, as_json: bool) -> None:
    from ..checkpoint import verify_folder

    with our_log(Screen(stderr=True)):
        found = verify_folder(folder)
    if as_json:
        console.json(found.as_dict())
    else:
        table = Table("part", "state", "what is wrong", title=str(folder))
        for row in found.rows():
            table.add_row(row["part"], row["state"], row["what"])
        console.print(table)
        console.print(f"Commands that still work: {', '.join(found.possible()) or 'none'}.", soft_wrap=True)
        if not found.holds:
            console.print(found.record.remedy(found.gives_base), soft_wrap=True)
    if not found.holds:
        raise typer.Exit(1)


def _tell_whether(console: Screen, question: str, lines: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        console.json({"holds": bool(lines), "requests": list(lines)})
    elif lines:
        steps = ", ".join(str(line["step"]) for line in lines)
        console.print(f"Forgotten in step {steps}: {question}", soft_wrap=True)
    else:
        console.print(f"Not among the requests of any step: {question}", soft_wrap=True)
    if not lines:
        raise typer.Exit(1)


def _steps_table(steps: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table("step", "method", "requests", "blocks", "rank", "|Δ|/|W|", "created", title=title)
    for entry in steps:
        taken = f" (-{entry['taken_back']})" if entry["taken_back"] else ""
        table.add_row(
            str(entry["step"]),
            entry["method"],
            f"{entry['requests']}{taken}",
            _listed(entry["layers"]),
            _span(entry["ranks"].values(), "d"),
            _span(entry["update_norm_ratio"].values(), ".3f"),
            entry["created"][:16].replace("T", " "),
        )
    return table


def _figures_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    """Figures before and after each step. A step has none if they are not known or not valid any more."""
    table = Table("step", "facts to forget answered", "facts to keep answered", "perplexity", title="Measured")
    for entry in steps:
        report = entry["report"] or {}
        if "forget" in report:
            counts = [(report[name], report[f"n_{name}"]) for name in ("forget", "retain")]
            shown = [f"{part['answered_before']} -> {part['answered_after']} of {count}" for part, count in counts]
            level = [_figure(report["perplexity"][name]) for name in ("before", "after")]
            table.add_row(str(entry["step"]), *shown, " -> ".join(level))
    return table


def _figure(value: float | None) -> str:
    """NaN and infinity are null in a report."""
    return "not finite" if value is None else f"{value:.2f}"


def _requests_table(found: Checkpoint) -> Table:
    table = Table("request", "step", "columns", "question")
    for line in found.ledger:
        table.add_row(
            line["question_sha256"][:SHOWN],
            str(line["step"]),
            _listed(line.get("columns") or ()),
            line.get("question", ""),
        )
    return table


def _listed(numbers: Sequence[int]) -> str:
    """All numbers, or first-last if they are consecutive."""
    run = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))
    return f"{numbers[0]}-{numbers[-1]}" if run else ", ".join(map(str, numbers))


def _span(numbers: Iterable[float], form: str) -> str:
    ends = sorted({format(number, form) for number in numbers}, key=float)
    return " to ".join(dict.fromkeys((ends[0], ends[-1]))) if ends else ""
