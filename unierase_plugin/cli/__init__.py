"""The command line. Heavy imports wait inside the commands, so that `unierase --help` answers at once."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from .. import __version__
from ..errors import StepAppliedError, UniEraseError
from .audit import audit
from .compare import compare
from .console import tell
from .evaluate import evaluate
from .finetune import finetune
from .harness import harness
from .lists import hparams, tasks_path
from .plugins import hosts, methods, plugins
from .record import export, inspect, revert
from .run import demo, run
from .stats import stats


class _Commands(TyperGroup):
    """Turns errors of ours into one red paragraph and exit status 1, and Ctrl-C into status 130."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except StepAppliedError as done:  # a command that is repeated after a stop has reached what it was to reach
            tell(escape(str(done)))
            raise typer.Exit(0) from done
        except UniEraseError as error:
            tell(f"[bold red]Error:[/] {escape(str(error))}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            tell("Stopped. Phases that were finished are kept: the same command goes on from there.")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Makes a causal language model forget given facts (UniErase, arXiv 2505.15674), and proves it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

app.command()(demo)
app.command()(run)
app.command()(finetune)
app.command()(stats)
app.command()(revert)
app.command()(export)
app.command()(inspect)
app.command()(audit)
app.command()(compare)
app.command()(hparams)
# lm-eval reads its own options, --help among them.
app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True,
                                      "help_option_names": []})(evaluate)  # fmt: skip
# What follows the script's name is the script's own.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True,
                              "allow_interspersed_args": False})(harness)  # fmt: skip
app.command("tasks-path")(tasks_path)
app.command()(methods)
app.command()(plugins)
app.command()(hosts)


def main() -> None:
    """Runs the command line."""
    app()


def _version(shown: bool) -> None:
    if shown:
        Console().print(f"unierase-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
