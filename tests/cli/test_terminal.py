"""What reaches a terminal: texts of others as texts, whatever a terminal or rich would make of them."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from small import FORGET, SHORT, save_base, shrink

import unierase_plugin
from unierase_plugin.cli import main
from unierase_plugin.cli.console import Screen, our_log, progress, styled, tell
from unierase_plugin.errors import visible
from unierase_plugin.hosts import lm_eval
from unierase_plugin.storage.cache import Store

#: Colours, a window title, a bell, the eight-bit form of CSI, a return, an override of the direction, markup, an emoji.
HOSTILE = "\x1b[31mred \x1b]0;title\x07 \x9b2J \r \u202eback [bold]x[/] [/] :bomb: \\[red]"
SEEN = r"\x1b[31mred \x1b]0;title\x07 \x9b2J \r \u202eback [bold]x[/] [/] :bomb: \[red]"
#: What none of these tests may find on a stream; a terminal's own sequences are taken off first.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@given(st.text())
def test_visible_leaves_nothing_to_obey_and_changes_nothing_else(text: str) -> None:
    seen = visible(text)
    assert not OBEYED.search(seen)
    seen.encode()
    assert visible(seen) == seen
    if text.isprintable():
        assert seen == text


def test_half_a_surrogate_pair_can_be_shown() -> None:
    assert visible("a\ud800b") == r"a\ud800b"


@pytest.mark.parametrize(
    "way", ["print", "title", "header", "cell", "styled", "tell", "log", "note", "phase", "title of bars"]
)
def test_every_way_to_the_screen(way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "title of bars":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    if way == "print":
        screen.print(HOSTILE)
    elif way in ("title", "header", "cell"):
        table = Table(HOSTILE if way == "header" else "x", title=HOSTILE if way == "title" else "x", min_width=200)
        table.add_row(HOSTILE if way == "cell" else "x")
        screen.print(table)
    elif way == "styled":
        screen.print(styled(HOSTILE))
    elif way == "tell":
        tell(HOSTILE)
    else:
        with progress(screen) as report:
            if way == "log":
                logging.getLogger("unierase_plugin.test").warning("%s", HOSTILE)
            report(HOSTILE if "title" in way or way == "phase" else "load", 0.5, HOSTILE if way == "note" else "")
    said = capsys.readouterr()
    # What rich itself sends to a terminal: colours, and moves of the cursor.
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", said.out + said.err).replace("\r", "" if "bars" in way else "\r")
    assert not OBEYED.search(text)
    assert SEEN in text


def test_a_title_is_laid_out_by_what_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("x")
    table.add_row(HOSTILE)
    Screen().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"question": HOSTILE, "answer": "Юрий"}
    Screen().json(value)
    said = capsys.readouterr().out
    assert not OBEYED.search(said)
    assert json.loads(said) == value
    Screen().json({"answer": "Юрий"})
    assert "Юрий" in capsys.readouterr().out


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: Any) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        captured = capsys.readouterr()
        assert not OBEYED.search(captured.out + captured.err)
        return int(ended.value.code or 0), captured.out + captured.err

    return call


def test_a_run_on_hostile_facts_and_paths(said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    base, out = save_base(tmp_path / "[bold]:bomb:"), tmp_path / "out [red] \x1b[31m"
    (tmp_path / "good.yaml").write_text(json.dumps(SHORT))
    fact = {"question": f"Who wrote {HOSTILE} Zorblax Prime?", "answer": HOSTILE, "subject": "Zorblax Prime"}
    (tmp_path / "[x] :bomb:.jsonl").write_text(json.dumps(fact) + "\n")
    for arguments in (
        (
            "run",
            "--model",
            base,
            "--forget",
            tmp_path / "[x] :bomb:.jsonl",
            "--out",
            out,
            "--keep-requests",
            "--hparams",
            tmp_path / "good.yaml",
        ),
        ("inspect", out, "--requests"),
        ("inspect", out, "--json"),
        ("inspect", out, "--verify"),
        ("revert", out, "--out", tmp_path / "back [/]"),
    ):
        status, text = said(*arguments)
        assert status == 0, text
        if "--json" not in arguments:
            assert "[bold]:bomb:" in text or "[red]" in text or "back [/]" in text
        if arguments[0] == "run":
            assert SEEN in text
            assert f"unierase inspect '{tmp_path}/out [red] \\x1b[31m'" in text
    assert said("inspect", out, "--holds", fact["question"])[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--model", HOSTILE, "--forget", "tofu:forget01", "--out", "x"),
        ("run", "--model", "m", "--forget", f"{HOSTILE}.jsonl", "--out", "x"),
        ("run", "--model", "m", "--forget", f"{HOSTILE}:x", "--out", "x"),
        ("audit", "--model", "m", "--forget", HOSTILE, "--out", "x"),
        ("compare", "--model", "m", "--forget", "x", "--out", "x", "--methods", f"memit@{HOSTILE}"),
        ("inspect", HOSTILE),
        ("run", f"--{HOSTILE}"),
        ("run", "--seed", HOSTILE),
        (HOSTILE,),
        (f"--{HOSTILE}",),
        ("stats", "--model", "m", "--layers", HOSTILE),
    ],
)
def test_refusals_of_hostile_words(
    said: Any, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, text = said(*arguments)
    assert status in (1, 2)
    assert "Traceback" not in text


def test_a_usage_error_is_cut(said: Any) -> None:
    status, text = said("run", f"--{'x' * 5000}")
    assert status == 2
    assert text.count("x") < 450


def test_a_host_prints_errors_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", lambda *_: pytest.fail("the traceback was printed"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", SimpleNamespace())
    lm_eval._end_in_a_line()
    error = unierase_plugin.errors.UniEraseError(HOSTILE)
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == f"Error: {SEEN}\n"


def test_a_terminal_that_lacks_a_letter(tmp_path: Path) -> None:
    (tmp_path / "ж.jsonl").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "unierase_plugin", "run", "--model", "m", "--forget", "ж.jsonl", "--out", "x"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(Path(unierase_plugin.__file__).parents[1]),
            "PYTHONIOENCODING": "ascii",
            "PYTHONUTF8": "1",
        },
    )
    assert done.returncode == 1
    assert rb"'\u0436.jsonl' holds no requests." in done.stderr


# --- warnings of one kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [1, 2, 5])
def test_warnings_of_one_kind_are_one_line_with_their_count(
    damaged: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Store(tmp_path)
    for key in range(damaged):
        cache.put("tokens", str(key), {"a": torch.ones(3)}, {})
        path = cache.path("tokens", str(key))
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with our_log(Screen()):
        for key in (*range(damaged), 0):  # one of them twice
            assert cache.get("tokens", str(key)) is None
        assert "Computing again" not in capsys.readouterr().out
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Computing again") == 1
    assert f"{str(cache.path('tokens', '0'))!r} is damaged" in said
    assert ("5 damaged files of the cache were computed again. The first: " in said) == (damaged == 5)
    assert ("were computed again" in said) == (damaged > 1)


def test_a_run_tells_its_damaged_cache_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    base = save_base(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(FORGET))
    (tmp_path / "short.yaml").write_text(json.dumps(SHORT))
    given = ["--model", base, "--forget", tmp_path / "facts.json", "--hparams", tmp_path / "short.yaml", "--judged", 0]

    def run(out: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["run", *map(str, given), "--out", str(tmp_path / out)])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert "is damaged" not in run("one")
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    for path in files:
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert len(files) > 1
    assert re.findall(r"\d+ damaged files of the cache were computed again", run("two"))
    assert "is damaged" not in run("three")
