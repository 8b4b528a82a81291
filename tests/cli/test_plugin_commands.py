"""Commands that plugins add to `unierase`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from installed import Install, installer
from typer.main import get_command
from typer.testing import CliRunner

from unierase_plugin.cli import app
from unierase_plugin.plugins.commands import OWN_COMMANDS
from unierase_plugin.plugins.registration import load_registry

HEAD = """
import sys
import typer
from unierase_plugin import UniEraseError, hookimpl
"""
RANK = """
def rank(facts: str, most: int = 3) -> None:
    '''Ranks the facts by how well the model knows them.'''
    typer.echo(f"{facts}, {most}")
    if most > 5:
        sys.exit(4)
    if most < 1:
        raise UniEraseError("--most is 0. Give more.")
@hookimpl
def register_commands(register):
    register("rank", rank)
"""
GROUP = """
app = typer.Typer(help="Quizzes.")
@app.command()
def make(quiz: str) -> None:
    '''Makes a quiz.'''
    typer.echo(f"made {quiz}")
@app.command()
def take(quiz: str) -> None:
    typer.echo(f"took {quiz}")
one = typer.Typer()
@one.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def only(context: typer.Context) -> None:
    typer.echo(context.args)
@hookimpl
def register_commands(register):
    register("quiz", app)
    register("hand-on", one)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    call = installer(tmp_path / "site", monkeypatch)
    return lambda name, body, **package: call(name, HEAD + body, **package)


def said(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done.output


def test_the_names_that_are_taken_are_those_of_the_command_line() -> None:
    assert set(OWN_COMMANDS) == set(get_command(app).commands)  # type: ignore[attr-defined]


def test_a_function_is_a_command_with_its_help_and_its_errors(install: Install) -> None:
    install("ranking", RANK)
    assert said("rank", "facts.json", "--most", "2") == "facts.json, 2\n"
    assert "Ranks the facts by how well the model knows them." in said("rank", "--help")
    assert said("rank", "x", "--most", "6", code=4) == "x, 6\n"
    assert said("rank", "x", "--most", "0", code=1).endswith("Error: --most is 0. Give more.\n")


def test_the_help_shows_each_command_with_its_plugin(install: Install) -> None:
    install("ranking", RANK)
    install("quizzes", GROUP, version="2")
    own, _, others = said("--help").partition("Commands of the plugin 'quizzes' (quizzes-package 2)")
    quizzes, _, ranking = others.partition("Commands of the plugin 'ranking' (ranking-package 1.2)")
    assert "tasks-path" in own
    assert "quiz " in quizzes
    assert "hand-on" in quizzes
    assert "Ranks the facts" in ranking


def test_an_application_is_a_group_or_its_only_command(install: Install) -> None:
    install("quizzes", GROUP)
    assert said("quiz", "make", "it") == "made it\n"
    assert "Makes a quiz." in said("quiz", "--help")
    assert said("hand-on", "--any", "thing") == "['--any', 'thing']\n"


BAD = {
    "takes a name of ours": (
        RANK.replace('register("rank"', 'register("run"'),
        "'run' is a command of unierase itself",
    ),
    "has a signature that typer cannot read": (
        RANK.replace("most: int", "most: int | str"),
        "typer makes no command 'rank'",
    ),
    "registers no command": (RANK.replace('"rank", rank', '"rank", 3'), "a function or a typer.Typer, not 'rank', 3"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_command_that_cannot_be_leaves_its_plugin_out(what: str, install: Install) -> None:
    body, why = BAD[what]
    install("ranking", body)
    install("quizzes", GROUP)
    found = load_registry()
    assert [why in plugin.error for plugin in found.plugins] == [False, False, True]
    assert set(found.commands) == {"quiz", "hand-on"}
    assert "--keep-requests" in said("run", "--help")
    assert "No such command 'rank'" in said("rank", "x", code=2)


def test_a_command_that_two_plugins_claim_is_nobodys(install: Install) -> None:
    install("ranking", RANK)
    install("other", RANK)
    assert "rank" not in said("--help").partition("Commands of the plugin")[2]
    assert "The command 'rank' is registered by 'other' (other-package 1.2) and by 'ranking'" in said("rank", code=1)


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom unierase_plugin.cli import app\n"
        "assert CliRunner().invoke(app, sys.argv[1:]).exit_code == 0\n"
        "sys.exit(str([name for name in ('torch', 'transformers', 'lm_eval', 'scipy') if name in sys.modules]))"
    )
    for arguments in (["--help"], ["methods"], ["plugins"], ["hosts"], ["audit", "--list"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert (arguments, done.stderr.strip()[-200:]) == (arguments, "[]")
