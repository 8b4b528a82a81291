"""Commands that list shipped files and folders."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..errors import UniEraseError
from .console import Screen


def hparams(
    method: Annotated[str, typer.Option(help="The method: see `unierase methods`.")] = "unierase",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Lists the shipped hyper-parameter files of a method."""
    from ..hparams import shipped_hparams
    from ..plugins.registration import registry

    kind = registry().methods.find(method.casefold()).hparams
    found = {name: kind.from_hparams(path).as_dict() for name, path in shipped_hparams(kind.folder).items()}
    console = Screen()
    if as_json:
        console.json(found)
        return
    edits = "layers" in kind().as_dict()
    table = Table("name", "model", *(["blocks edited"] if edits else []))
    for name, values in found.items():
        blocks = [", ".join(map(str, values["layers"]))] if edits else []
        table.add_row(name, str(values.get("model_name", "")) or "any", *blocks)
    console.print(table)


def tasks_path(
    benchmark: Annotated[
        str, typer.Argument(help="A benchmark of a plugin: prints the folder of its tasks instead.")
    ] = "",
) -> None:
    """Prints the folder of this package's lm-eval tasks: lm_eval --include_path "$(unierase tasks-path)" ..."""
    from ..plugins.registration import registry
    from ..tasks.task_manager import tasks_folder

    folder = registry().benchmarks.find(benchmark).tasks if benchmark else tasks_folder()
    if folder is None:
        having = [name for name, each in registry().benchmarks.items() if each.tasks is not None]
        raise UniEraseError(f"The benchmark {benchmark!r} has no lm-eval tasks. These have: {', '.join(having)}.")
    typer.echo(str(folder))
