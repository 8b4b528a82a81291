"""Files, paths and values that no program should trust: one line that names file and line, before a model is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from small import FORGET, SHORT, shrink

from unierase_plugin import UniEraseHyperParams, pipeline
from unierase_plugin.audit.runner import audit
from unierase_plugin.checkpoint import check_output_folder
from unierase_plugin.cli import PLACES, app, main
from unierase_plugin.errors import HyperParamsError, RequestError, UniEraseError
from unierase_plugin.facts.readers import read_requests
from unierase_plugin.facts.request import ForgetRequest
from unierase_plugin.finetune import finetune
from unierase_plugin.settings.values import coerced
from unierase_plugin.tasks.reference import read_reference

Refused = Callable[..., str]

GOOD = json.dumps(FORGET[0])
#: Each level is nine of the one below: 9^8 values from a few lines.
MULTIPLYING = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{below}'] * 9)}]\n" for below, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """What `unierase COMMAND` says when it is refused; options are keywords, and good ones where not given."""
    (tmp_path / "good.yaml").write_text(json.dumps(SHORT))
    (tmp_path / "good.jsonl").write_text(GOOD + "\n")

    def call(command: str = "run", **options: Any) -> str:
        facts = "facts" if command == "finetune" else "forget"
        good = {"model": tmp_path / "model", facts: tmp_path / "good.jsonl", "out": tmp_path / "out"}
        given = {**good, **({"hparams": tmp_path / "good.yaml"} if command == "run" else {}), **options}
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        with pytest.raises(SystemExit) as ended:
            main([command, *arguments])
        said = capsys.readouterr().err
        assert ended.value.code == 1, said
        assert said.count("Error:") == 1
        assert len(said) < 1500
        return " ".join(said.split()).partition("Error: ")[2]

    return call


# --- facts -----------------------------------------------------------------------------------------------------------

FACTS = {
    "half a surrogate pair": ("a.jsonl", GOOD + '\n{"question": "Who is \\ud800 Ann?", "answer": "x"}', 2, "half a"),
    "and in a field of no use": ("a.jsonl", GOOD + '\n{"question": "q", "answer": "x", "note": ["\\udc00"]}', 2, ""),
    "in a list": ("a.json", f'[{GOOD},\n\n{{"question": "q",\n "answer": "\\udfff"}}]', 3, "half a surrogate"),
    "nested lists": ("a.jsonl", GOOD + "\n" + "[" * 200_000, 2, "nested too deeply"),
    "nested objects": ("a.jsonl", GOOD + "\n" + '{"a":' * 200_000, 2, "nested too deeply"),
    "nested and closed": ("a.json", f"[{GOOD},\n" + "[" * 100_000 + "]" * 100_000 + "]", 2, "nested too deeply"),
    "digits": ("a.jsonl", GOOD + '\n{"question": "q", "answer": "x", "case_id": ' + "9" * 6000 + "}", 2, "many digits"),
    "NaN": ("a.jsonl", GOOD + '\n{"question": "q", "answer": NaN}', 2, "NaN is no number"),
    "infinity in a list": ("a.json", f'[{GOOD},\n{{"question": "q", "answer": -Infinity}}]', 2, "-Infinity is no"),
    "a name twice": ("a.jsonl", GOOD + '\n{"question": "q", "question": "p", "answer": "x"}', 2, "'question' is given"),
    "NUL": ("a.jsonl", GOOD + '\n{"question": "Who is \\u0000Ann?", "answer": "x"}', 2, "a NUL character"),
    "NUL in a cell": ("a.csv", "question,answer\nq,x\np,\0y\n", 3, "a NUL character"),
    "a column twice": ("a.csv", "question,answer,answer\nq,x,y\n", 1, "two columns are called 'answer'"),
    "Latin-1": ("a.jsonl", (GOOD + "\nJos\xe9").encode("latin-1"), 2, "not UTF-8 text (byte 0xe9)"),
    "UTF-16": ("a.csv", "question,answer\n".encode("utf-16"), 1, "not UTF-8 text but UTF-16"),
}


@pytest.mark.parametrize("option", ["forget", "retain"])
@pytest.mark.parametrize(("name", "text", "line", "says"), FACTS.values(), ids=FACTS)
def test_bad_facts(
    refused: Refused, tmp_path: Path, option: str, name: str, text: str | bytes, line: int, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(**{option: path})
    assert message.startswith((f"{path}, line {line}: ", f"{path}, row {line}: "))
    assert says in message


@pytest.mark.parametrize("command", ["run", "finetune", "audit", "compare"])
def test_every_command_reads_facts_in_this_way(refused: Refused, tmp_path: Path, command: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "Who is \\ud800?", "answer": "x"}')
    assert "a.jsonl, line 1: a text holds half a" in refused(
        command, **{"facts" if command == "finetune" else "forget": tmp_path / "a.jsonl"}
    )


def test_what_is_unusual_and_sound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "Who is \\ud83d\\ude00?", "answer": "x", "answer": "x"}\r\n')
    assert read_requests(path)[0].question == "Who is \N{GRINNING FACE}?"


@pytest.mark.parametrize("field", ["question", "answer", "subject", "case_id", "target"])
@pytest.mark.parametrize("text", ["a \ud800", "a \0"])
def test_a_request_holds_no_text_that_cannot_be_written(field: str, text: str) -> None:
    """Harnesses make requests without a file."""
    with pytest.raises(RequestError, match=f"'{field}' holds (half a surrogate pair|a NUL character)"):
        ForgetRequest(**{"question": "a", "answer": "b", field: text})  # type: ignore[arg-type]


# --- settings --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "UTF-16": ("seed: 1\n".encode("utf-16"), 1, "not UTF-8 text but UTF-16"),
    "Latin-1": ("seed: 1\nalg_name: Jos\xe9\n".encode("latin-1"), 2, "not UTF-8 text (byte 0xe9)"),
    "aliases": (MULTIPLYING, 5, "more than 20000 values"),
    "aliases for the template": ("chat_template_kwargs:\n  " + MULTIPLYING.replace("\n", "\n  "), 6, "more than 20000"),
    "itself": ("seed: 1\nchat_template_kwargs: &a\n  x: *a\n", 2, "it holds itself"),
    "nesting": ("seed: 1\nlayers: " + "[" * 1500, 2, "nested too deeply"),
    "digits": ("alg_name: x\nseed: " + "9" * 6000, 2, "too many digits"),
    "month 13": ("alg_name: x\nseed: 2020-13-01", 2, "month must be in 1..12"),
    "half a surrogate pair": ('seed: 1\nunlearning_token: "\\ud800"\n', 2, "half a surrogate pair"),
    "an escape": (b'seed: 1\nalg_name: "\x1b[31m"\n', 2, "special characters are not allowed"),
    "a name twice": ("seed: 1\nv_lr: 1\nseed: 2\n", 3, "'seed' is given twice"),
    "a list as a name": ("seed: 1\n[1, 2]: 3\n", 2, "found unhashable key"),
    "an object": ("seed: !!python/object/apply:os.getcwd []\n", 1, "could not determine a constructor"),
    "NaN": ("seed: 1\nv_lr: .nan\n", 2, "v_lr = nan is not a finite number"),
    "infinite": ("seed: 1\nlayers: [.inf]\n", 2, "layers = inf is not a whole number"),
    "a date": ("chat_template_kwargs: {day: 2020-01-01}\n", 1, "'day' is a date. Give texts"),
    "NaN for the template": ("chat_template_kwargs: {share: [.nan]}\n", 1, "'share' is nan"),
    "a seed of 100 bits": ("v_lr: 1\nseed: 1" + "0" * 30, 2, "has more than 63 bits"),
    "a seed below 0": ("v_lr: 1\nseed: -1\n", 2, "must be a whole number from 0 to 4294967295"),
    "an unknown name": ("v_lr: 1\nlayer: [1]\n", 2, "Unknown hyper-parameter 'layer'"),
}


@pytest.mark.parametrize(("text", "line", "says"), SETTINGS.values(), ids=SETTINGS)
def test_bad_settings(refused: Refused, tmp_path: Path, text: str | bytes, line: int, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(hparams=path)
    assert message.startswith(f"{path}, line {line}: ")
    assert says in message


def test_a_file_of_settings_is_small(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("seed: 1\n#" + "x" * (1 << 20))
    with pytest.raises(HyperParamsError, match="more than 1048576 bytes"):
        UniEraseHyperParams.from_hparams(tmp_path / "big.yaml")


def test_aliases_of_sound_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("layers: &blocks [1, 2]\nremoval_layers: *blocks\nv_lr: 1e-1\nv_lr: 1e-1\n")
    settings = UniEraseHyperParams.from_hparams(tmp_path / "a.yaml")
    assert (settings.layers, settings.removal_layers, settings.v_lr) == ((1, 2), (1, 2), 0.1)


def test_a_large_whole_number_keeps_its_digits() -> None:
    assert coerced("some_setting", 2**60 + 1, int) == 2**60 + 1


@pytest.mark.parametrize("seed", [-1, 2**32, 2**62])
@pytest.mark.parametrize("command", ["run", "finetune", "audit", "compare"])
def test_a_seed_that_a_library_would_refuse_later(refused: Refused, command: str, seed: int) -> None:
    option = "seeds" if command == "compare" else "seed"
    assert f"seed = {seed} must be a whole number from 0 to 4294967295" in refused(command, **{option: seed})


def test_the_largest_seed_is_taken_by_all_that_draw() -> None:
    import torch
    from transformers import set_seed

    from unierase_plugin.settings.values import MOST_SEED
    from unierase_plugin.unlearning_token import NOISE_DRAWS

    set_seed(MOST_SEED)
    torch.Generator().manual_seed(MOST_SEED * NOISE_DRAWS + NOISE_DRAWS)
    torch.Generator().manual_seed((MOST_SEED + 1) * 1_000_003 + 10**6)
    with pytest.raises(ValueError, match="between 0 and 2"):
        set_seed(MOST_SEED + 1)


@pytest.mark.parametrize("layers", ["9" * 5000, "0-99999999999999", "3-1", "1-", "-1", "1:2"])
def test_blocks_that_are_none(capsys: pytest.CaptureFixture[str], layers: str) -> None:
    with pytest.raises(SystemExit):
        main(["stats", "--model", "m", f"--layers={layers}"])
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("is not a list of blocks. Write it as 3-7 or 3,5,7.")
    assert len(said) < 400


@pytest.mark.parametrize("setting", ["v_lr=[", "v_lr=2020-13-01", "layers=" + "[" * 1500, "seed=" + "9" * 6000])
def test_bad_settings_of_a_method_that_is_compared(refused: Refused, setting: str) -> None:
    assert refused("compare", methods=f"memit@{setting}").startswith(setting.partition("=")[0] + " in 'memit@")


# --- paths -----------------------------------------------------------------------------------------------------------

PATHS = {
    "long": ("x" * 300, "file name too long"),
    "a loop": ("loop", "too many levels of symbolic links"),
    "no home": ("~nobody-of-that-name/x", "Could not determine home directory"),
    "not UTF-8": ("a\udcff", "is not UTF-8"),
}


@pytest.mark.parametrize("option", ["model", "forget", "retain", "hparams", "corpus", "out"])
@pytest.mark.parametrize(("name", "says"), PATHS.values(), ids=PATHS)
def test_a_path_that_no_file_system_takes(refused: Refused, tmp_path: Path, option: str, name: str, says: str) -> None:
    os.symlink("loop", tmp_path / "loop")
    message = refused(**{option: tmp_path / name if name == "loop" else name})
    assert says.casefold() in message.casefold()


#: Every parameter of a command that names a place, as it is given on the command line.
EMPTY = {
    (name, parameter.name): next((each for each in parameter.opts if each.startswith("-")), "")
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    for parameter in command.params
    if parameter.name in PLACES
}


@pytest.mark.parametrize(("command", "option"), [(command, option) for (command, _), option in EMPTY.items()])
def test_an_empty_name_is_no_place(capsys: pytest.CaptureFixture[str], command: str, option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, *([f"{option}="] if option else [""])])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"{option} is given an empty text, which names nothing." in said


def test_every_path_of_a_command_is_a_place() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    hints = {name: get_type_hints(command.callback) for name, command in commands.items()}
    paths = {(name, each) for name, found in hints.items() for each, hint in found.items() if "Path" in str(hint)}
    assert paths
    assert paths <= EMPTY.keys()


@pytest.mark.parametrize(
    "call",
    [
        lambda facts: finetune("model", facts, ""),
        lambda facts: audit("model", facts, out=""),
        lambda facts: pipeline.unlearn("model", facts, out=""),
        lambda _: check_output_folder(""),
    ],
    ids=["finetune", "audit", "unlearn", "folder"],
)
def test_an_empty_name_is_no_place_for_a_program_either(tmp_path: Path, call: Callable[[str], Any]) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(UniEraseError, match="is empty"):
        call(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("what", ["file", "below a file", "long name", "no home", "HOME is empty"])
def test_a_cache_that_cannot_be(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    if "home" in what.casefold():
        monkeypatch.delenv("UNIERASE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "")
        if what == "no home":
            monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        assert "the home folder is not known (HOME is not set). Set UNIERASE_CACHE" in refused()
        return
    places = {"file": file, "below a file": file / "cache", "long name": tmp_path / ("x" * 300)}
    monkeypatch.setenv("UNIERASE_CACHE", str(places[what]))
    message = refused()
    assert message.startswith("The cache folder '")
    assert ("file name too long" if what == "long name" else f"'{file}' is a file. Set UNIERASE_CACHE") in message


def test_a_corpus_that_is_not_text(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes(b"It rained.\n\nJos\xe9 slept.\n")
    message = refused(corpus=tmp_path / "corpus.txt")
    assert message.startswith(f"{tmp_path / 'corpus.txt'}, line 3: not UTF-8 text (byte 0xe9). Save the file as UTF-8.")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "[" * 200_000, "a.json, line 1: nested too deeply"),
        ("a.jsonl", '{"doc_id": 0, "truth_ratio": 1}\n{"doc_id":', "a.jsonl, line 2: malformed JSON"),
        ("a.jsonl", '{"doc_id": 0, "truth_ratio": NaN}', "holds a truth ratio that is NaN"),
        ("a.json", "\0", "a.json, line 1: holds a NUL"),
    ],
)
def test_a_reference_that_cannot_be_read(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UniEraseError, match=says):
        read_reference(tmp_path / name, "tofu_forget01", ["q"])
