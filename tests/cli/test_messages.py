"""What messages tell: enough to find what is meant, and never more of a fact than its case_id and its first words."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import FORGET, SHORT, save_base, shrink
from tiny import tiny_tokenizer

import unierase_plugin
from unierase_plugin.checkpoint import record
from unierase_plugin.cli import main
from unierase_plugin.errors import UniEraseError, first_words, listed, reason, shown
from unierase_plugin.facts.request import ForgetRequest, check_requests, with_subjects
from unierase_plugin.hosts.in_place import make_request
from unierase_plugin.locate_then_edit.positions import locate

PACKAGE = Path(unierase_plugin.__file__).parent
#: Names in this package under which a fact's texts go about.
FACTS = {"question", "answer", "subject", "prompt", "text", "asked", "record", "wrong", "said", "target", "fact"}
#: What makes any of them fit for a message.
CUTS = {"first_words", "shown", "listed", "reason", "len", "type"}
LONG = "x" * 100_000
SECRET = "Zanzibar"
#: Whatever is told of it, the end is not.
TELLING = f"Who wrote the long and {'very ' * 10_000}good book on {SECRET}?"


@given(st.text(max_size=3000))
def test_a_value_is_cut(value: str) -> None:
    assert shown(value) == repr(value) or len(shown(value)) < 240
    assert shown(value).isprintable()


@given(st.text(max_size=3000))
def test_a_fact_is_told_by_its_first_words(text: str) -> None:
    told = first_words(text)
    assert told.isprintable()
    assert len(told) <= 12 * 44
    inside = ast.literal_eval(told)
    kept = inside.removesuffix(" …")
    assert inside == text or " ".join(text.split()).startswith(kept)
    assert len(kept.split()) <= 4


def test_what_is_written_without_spaces_is_cut_too() -> None:
    assert first_words("フランスの首都はどこですか。パリです。") == "'フランスの首都はどこですか …'"
    assert first_words("Столица Франции") == "'Столица Франции'"


@pytest.mark.parametrize("value", [["a", SECRET], {"a": SECRET}, (SECRET,)])
def test_what_is_no_text_is_told_by_its_type(value: Any) -> None:
    assert first_words(value) == f"a {type(value).__name__}"


def test_names_and_reasons_are_cut() -> None:
    assert listed(["question", "answer"]) == "question, answer"
    assert listed([]) == "none"
    assert len(listed([TELLING] * 5000)) < 1000
    assert listed(map(str, range(30))).endswith("19 and 10 more")
    assert len(reason(ValueError(LONG))) < 310
    assert reason(ValueError("one\ntwo")) == "one two"
    assert shown(10**5000) == "a int that is too large to be shown"


def test_no_message_tells_a_fact_as_it_is() -> None:
    """Every error that is raised, and every line of the log."""
    leaks = [
        f"{path.name}:{part.lineno}: {ast.unparse(part.value)}"
        for path in PACKAGE.rglob("*.py")
        for message in _messages(ast.parse(path.read_text(encoding="utf-8")))
        for part in ast.walk(message)
        if isinstance(part, ast.FormattedValue) and _tells(part.value)
    ]
    assert leaks == []


def _messages(tree: ast.AST) -> list[ast.AST]:
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    logged = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("logger.", "warnings.warn"))
    ]
    return [*raised, *logged]


def _tells(value: ast.expr) -> bool:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in CUTS:
        return False
    name = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""
    return name in FACTS


# --- as a user sees them ---------------------------------------------------------------------------------------------

FAULTS = {
    "no answer": {"question": TELLING},
    "an answer of another type": {"question": TELLING, "answer": [SECRET] * 1000},
    "a blank answer": {"question": TELLING, "answer": " "},
    "a subject from elsewhere": {"question": TELLING, "answer": "x", "subject": f"{'Bob ' * 5000}{SECRET}"},
    "facts as names": {f"{index} {TELLING}": SECRET for index in range(50)},
    "a list": [TELLING, SECRET],
    "a text": TELLING,
    "longer than the context": {"question": TELLING, "answer": SECRET, "subject": SECRET},
    "and named": {"question": TELLING, "answer": SECRET, "subject": SECRET, "case_id": "a-7"},
    "no subject": {"question": "who is he and what did he do when and why and where", "answer": SECRET},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_refused_fact_is_told_by_its_first_words_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Any
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(FORGET[0]) + "\n" + json.dumps(fault) + "\n")
    said = _refusal(monkeypatch, capsys, base, tmp_path, forget=tmp_path / "a.jsonl")
    assert SECRET not in said
    assert len(said) < 1200
    assert "line 2" in said or "a-1" in said or "a-7" in said


@pytest.mark.parametrize("option", ["method", "device", "dtype", "forget", "retain", "model", "hparams", "out"])
def test_a_long_value_is_cut(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(FORGET[0]) + "\n")
    value = f"tofu:{LONG}" if option in ("forget", "retain") else LONG
    said = _refusal(monkeypatch, capsys, base, tmp_path, **{"forget": tmp_path / "a.jsonl", option: value})
    assert len(said) < 1200
    assert f"…{'x' * 60}" in said


def _refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path, folder: Path, **options: Any
) -> str:
    shrink(monkeypatch, folder / "cache")
    monkeypatch.setenv("COLUMNS", "300")
    (folder / "good.yaml").write_text(json.dumps(SHORT))
    given = {"model": base, "out": folder / "out", "hparams": folder / "good.yaml", **options}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 1, said
    return said


def test_messages_of_the_api_are_cut_too() -> None:
    request = ForgetRequest(TELLING, SECRET, case_id="a-7")
    long = ForgetRequest(f"{TELLING} again", SECRET)
    manifest = {"salt": "s", "steps": []}
    lines = [{"question_sha256": "0" * 8 + f"{index:056x}"} for index in range(2)]
    for refused, names in (
        (lambda: check_requests([request, request]), "case_id 'a-7'"),
        (lambda: with_subjects([ForgetRequest("how is it " * 100, SECRET)]), "request 0"),
        (lambda: locate(tiny_tokenizer(), long.question, f"Bob {TELLING}"), "Bob Who wrote the"),
        (lambda: make_request({"prompt": [TELLING]}, 3, answer=None, target=None), "request 3"),
        (lambda: make_request({"prompt": f"{{}} {TELLING}"}, 3, answer=None, target=None), "request 3"),
        (lambda: record.Checkpoint(manifest, None, (), None, lines, {}).find("0" * 8), "'00000000' names 2"),
    ):
        with pytest.raises(UniEraseError) as told:
            refused()
        assert SECRET not in str(told.value)
        assert names in str(told.value)
        assert len(str(told.value)) < 400
