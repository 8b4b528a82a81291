"""Commands that plugins add to `unierase`, made from functions and from typer's applications."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..errors import PluginError

if TYPE_CHECKING:
    from .catalogue import Plugin

#: The names of the commands of `unierase` itself, which no plugin can take.
OWN_COMMANDS = (
    *("demo", "run", "finetune", "stats", "revert", "export", "inspect", "audit", "compare", "hparams", "eval"),
    *("harness", "tasks-path", "methods", "plugins", "hosts"),
)


def made_command(name: str, thing: Any, owner: Plugin) -> Any:
    """The command that typer makes of a function, or of a `typer.Typer`.

    A `typer.Typer` with one command and no callback becomes that command. Any other becomes a group of commands.
    Raises PluginError for the name of a command of `unierase` itself, and for what typer cannot use.
    """
    import typer
    from typer.main import get_group

    if name in OWN_COMMANDS:
        raise PluginError(f"{name!r} is a command of unierase itself. Choose another name.")
    outer = typer.Typer(add_completion=False)
    # typer makes a group only of two commands or more.
    outer.command("-")(lambda: None)
    if not isinstance(thing, typer.Typer):
        outer.command(name)(thing)
    elif _is_one_command(thing):
        info = copy.copy(thing.registered_commands[0])
        info.name = name
        outer.registered_commands.append(info)
    else:
        outer.add_typer(thing, name=name)
    try:
        command = get_group(outer).commands[name]
    except Exception as error:  # typer raises several kinds, depending on the signature
        raise PluginError(f"typer makes no command {name!r} of {thing!r} ({error})") from error
    command.rich_help_panel = f"Commands of the plugin {owner}"  # type: ignore[attr-defined]
    return command


def _is_one_command(app: Any) -> bool:
    return len(app.registered_commands) == 1 and not app.registered_groups and app.registered_callback is None
