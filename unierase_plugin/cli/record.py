"""Commands that read or rewrite the record of an edited folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .console import Overwrite, our_log


def revert(
    folder: Annotated[Path, typer.Argument(help="A folder that `unierase run` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the model as it was.")],
    step: Annotated[int, typer.Option(help="Steps to keep; 0 gives the base model to the bit.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Takes an edit back, exactly."""
    from ..checkpoint import revert_checkpoint

    console = Console()
    with our_log(console):
        written = revert_checkpoint(folder, out, overwrite, step)
    console.print(f"Written: {escape(str(written))}", soft_wrap=True)


def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that `unierase run` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Manifest and report as JSON.")] = False,
) -> None:
    """Shows what was done to a model: steps, settings, versions, and what was measured."""
    from ..checkpoint import read_checkpoint

    found = read_checkpoint(folder)
    console = Console()
    if as_json:
        console.print_json(json.dumps({"manifest": dict(found.manifest), "report": dict(found.report)}))
        return
    table = Table(
        "step",
        "method",
        "requests",
        "blocks",
        "created",
        title=f"{escape(str(folder))}, from {found.manifest['model']}",
    )
    for number, step in enumerate(found.manifest["steps"], start=1):
        table.add_row(str(number), step["method"], str(step["requests"]), str(step["layers"]), step["created"])
    console.print(table)
