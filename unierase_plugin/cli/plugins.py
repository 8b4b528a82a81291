"""Commands that list what this package and the installed plugins register."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import Screen

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def methods(as_json: AsJson = False) -> None:
    """Lists the unlearning methods: what each does, the paper to cite, and its settings."""
    from ..plugins.registration import registry

    found = registry().methods
    rows = [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper,
            "plugin": found.owner(method.name).name,
            "hparams": method.hparams().as_dict(),
        }
        for method in found.values()
    ]
    _show(as_json, rows, ("name", "title", "paper", "plugin"))


def plugins(as_json: AsJson = False) -> None:
    """Lists the plugins: version, hooks, package, what each registers, and why one cannot be loaded.

    UNIERASE_PLUGINS=name,name loads only these. UNIERASE_PLUGINS= loads none. What comes with the package stays.
    """
    import dataclasses

    from ..plugins.catalogue import BUILT_IN
    from ..plugins.registration import registry

    found = registry()
    rows = [{**dataclasses.asdict(plugin), "registers": found.registered_by(plugin)} for plugin in found.plugins]
    _show(as_json, rows, ("name", "version", "hooks", "package", "module"))
    for row in () if as_json else rows:
        if row["error"]:
            Screen().print(f"{row['name']} cannot be used: {row['error']}", soft_wrap=True)
        if row["name"] != BUILT_IN:
            for kind, names in row["registers"].items():
                Screen().print(f"{row['name']}: {kind} {', '.join(names)}", soft_wrap=True)


def hosts(as_json: AsJson = False) -> None:
    """Lists the harnesses that can be told of UniErase, and whether that happens when they are imported.

    UNIERASE_AUTOLOAD=0 switches that off. docs/how-to/hosts.md explains it.
    """
    from ..hosts import is_awaited, is_installed
    from ..plugins.registration import registry

    found = registry().hosts
    rows = [
        {
            "name": host.name,
            "title": host.title,
            "plugin": found.owner(host.name).name,
            "installed": is_installed(host),
            "registers_itself": is_awaited(host),
        }
        for host in found.values()
    ]
    _show(as_json, rows, ("name", "title", "plugin", "installed", "registers_itself"))


def _show(as_json: bool, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    console = Screen()
    if as_json:
        console.json(rows)
        return
    table = Table(*(name.replace("_", " ") for name in columns))
    for row in rows:
        table.add_row(*(_text(row[name]) for name in columns))
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, (list, tuple)) else str(value)
