"""The commands on the pages are ones that the command line takes, and those of the tutorial run, one after another."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from small import SHORT, save_base, shrink
from typer import Context
from typer.main import get_command
from typer.testing import CliRunner

from unierase_plugin.cli import app
from unierase_plugin.hparams import UniEraseHyperParams

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: These pass unknown options on: to lm-eval, and to the script that they run.
PASSING_ON = {"eval", "harness"}
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def commands(page: Path) -> list[list[str]]:
    """Arguments of every `unierase` line in a block of a page; lines that end in a backslash are joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = [re.match(r"(?:    )?(?:\S*/)?unierase (.*)", line) for line in text.splitlines()]
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_has_the_options_that_it_is_given(page: Path) -> None:
    group = get_command(app)
    with Context(group, info_name="unierase") as above:
        for name, *arguments in commands(page):
            command = group.get_command(above, name)  # type: ignore[attr-defined]
            assert command is not None, name
            if name not in PASSING_ON:
                given, *_ = command.make_parser(Context(command, parent=above)).parse_args(args=list(arguments))
                missing = [each.name for each in command.params if each.required and not given.get(each.name)]
                assert missing == [], (name, arguments)


def test_the_pages_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40


def test_the_tutorial_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model, few steps and two attacks, and without the demo, which needs a model of its own."""
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch, tmp_path / "cache")
    save_base(tmp_path / "tiny")
    Path("short.yaml").write_text(yaml.safe_dump(UniEraseHyperParams(**SHORT).replace(layers=[1]).as_dict()))
    more = {"run": ["--hparams", "short.yaml"], "audit": ["--attacks", "plain,token-ban"]}
    ran = []
    for page in ("1-forget.md", "2-audit.md"):
        path = ROOT / "docs/tutorial" / page
        text = path.read_text(encoding="utf-8")
        for name, content in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, flags=re.DOTALL):
            Path(name).write_text(content, encoding="utf-8")
        for name, *arguments in commands(path):
            if name != "demo":
                given = [argument.replace(MODEL, "tiny") for argument in arguments]
                added = more.get(name, []) if "--list" not in given else []
                done = CliRunner().invoke(app, [name, *given, *added])
                assert done.exit_code == 0, (name, done.output)
                ran.append(name)
    assert ran == ["run", "inspect", "revert", "audit", "audit"]
    assert Path("audit/audit.html").stat().st_size > 1000
    assert Path("base/model.safetensors").is_file()
