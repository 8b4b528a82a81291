"""The command line. Heavy imports wait inside the commands, so that `unierase --help` answers at once."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import StepAppliedError, UniEraseError, reason, visible
from ..version import __version__
from .audit import audit
from .compare import compare
from .console import Screen, styled, tell
from .evaluate import evaluate
from .finetune import finetune
from .harness import harness
from .lists import hparams, tasks_path
from .plugins import hosts, methods, plugins
from .record import export, inspect, revert
from .run import demo, run
from .signals import ended_by_signals, status_of
from .stats import stats

#: Characters of what is said of an option that is wrong.
LONGEST_USAGE = 400
#: Parameters of the commands that name a file, a folder, a model or a SPEC.
PLACES = {
    "adapter",
    "base",
    "corpus",
    "facts",
    "folder",
    "forget",
    "holdout",
    "hparams",
    "model",
    "out",
    "reference",
    "retain",
    "script",
    "sources",
}


@contextmanager
def _plain_usage_errors() -> Iterator[None]:
    """What typer says of an option that is wrong, cut where it is long, and with nothing that a terminal would obey."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        # typer has its own copy of click, or click itself, by version.
        said = getattr(error, "message", None)
        if hasattr(error, "format_message") and isinstance(said, str) and said:
            error.message = reason(ValueError(visible(said)), LONGEST_USAGE)  # type: ignore[attr-defined]
        raise


class _Command(TyperCommand):
    """Refuses an empty name, as a variable of a shell that is not set gives one.

    As a path it would mean the working folder, and of some options that they were left out.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        given, *_ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.params:
            value = given.get(parameter.name)
            if parameter.name in PLACES and (value == "" or (isinstance(value, list) and "" in value)):
                named = next((each for each in parameter.opts if each.startswith("-")), parameter.name.upper())
                option = "." if parameter.required else ", or leave the option out."
                raise UniEraseError(f"{named} is given an empty text, which names nothing. Give a name{option}")
        return super().parse_args(ctx, args)


class _Commands(TyperGroup):
    """Turns errors of ours into one red paragraph and exit status 1, and signals into a line and theirs.

    Ctrl-C gives 130, SIGTERM 143, SIGHUP 129. Commands of plugins come after those of this package.
    """

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        from ..plugins.registration import registry

        return [*super().list_commands(ctx), *registry().commands]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        from ..plugins.registration import registry

        return registry().commands.get(cmd_name)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        with _plain_usage_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            with ended_by_signals(), _plain_usage_errors():
                return super().invoke(ctx)
        except StepAppliedError as done:  # a command that is repeated after a stop has reached what it was to reach
            tell(str(done))
            raise typer.Exit(0) from done
        except UniEraseError as error:
            tell(styled(("Error:", "bold red"), f" {error}"))
            raise typer.Exit(1) from error
        except OSError as error:
            from ..storage.atomic import is_full

            if not is_full(error):
                raise
            tell(styled(("Error:", "bold red"), f" {error}. Free some room; the same command goes on from there."))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as stop:
            with suppress(OSError):  # a terminal that hung up takes no line
                tell("Stopped. Phases that were finished are kept: the same command goes on from there.")
            raise typer.Exit(status_of(stop)) from None


app = typer.Typer(
    cls=_Commands,
    help="Makes a causal language model forget given facts (UniErase, arXiv 2505.15674), and proves it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

command = functools.partial(app.command, cls=_Command)

command()(demo)
command()(run)
command()(finetune)
command()(stats)
command()(revert)
command()(export)
command()(inspect)
command()(audit)
command()(compare)
command()(hparams)
# lm-eval reads its own options, --help among them.
command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    evaluate
)
# What follows the script's name is the script's own.
command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False})(
    harness
)
command("tasks-path")(tasks_path)
command()(methods)
command()(plugins)
command()(hosts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on the arguments, by default those of the process."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no such letter is told its number, instead of ending the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(args=arguments)


def _version(shown: bool) -> None:
    if shown:
        Screen().print(f"unierase-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
