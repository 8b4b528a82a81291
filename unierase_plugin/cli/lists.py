"""Commands that list what is there."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def hparams(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Lists the shipped hyper-parameter files."""
    from ..hparams import UniEraseHyperParams, shipped_hparams

    found = {name: UniEraseHyperParams.from_hparams(path) for name, path in shipped_hparams().items()}
    console = Console()
    if as_json:
        console.print_json(json.dumps({name: values.as_dict() for name, values in found.items()}))
        return
    table = Table("name", "model", "blocks edited")
    for name, values in found.items():
        table.add_row(name, values.model_name, ", ".join(map(str, values.layers)))
    console.print(table)


def tasks_path() -> None:
    """Prints the folder of lm-eval tasks: lm_eval --include_path "$(unierase tasks-path)" ..."""
    from ..evaluation.lm_eval_cli import tasks_folder

    typer.echo(str(tasks_folder()))
