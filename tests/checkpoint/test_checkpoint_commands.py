"""What a user is shown of a record, and that it does not tell what was to be forgotten."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small import FORGET, FORGET_MORE, HPARAMS, RETAIN, save_base, shrink
from typer.testing import CliRunner

from unierase_plugin import pipeline, unlearn
from unierase_plugin.checkpoint import ledger_hash, read_checkpoint, unseal
from unierase_plugin.cli import app

QUESTIONS = [fact["question"] for fact in (*FORGET, *FORGET_MORE)]
#: The facts, and what names them: a case_id is the user's own word and may.
FACTS = [{**fact, "case_id": f"ticket {fact['subject']}"} for fact in (*FORGET, *FORGET_MORE)]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`one` and `two` without, `clear` with the requests kept; and the cache that all of them used."""
    root = tmp_path_factory.mktemp("steps")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, root / "cache")
        patch.setattr(pipeline.run, "answers", knowing)
        model: Path = save_base(root / "base")
        unlearn(model, FACTS[:2], retain=RETAIN, hparams=HPARAMS, out=root / "one")
        unlearn(root / "one", FACTS[2:], hparams=HPARAMS, out=root / "two")
        unlearn(model, FACTS[:2], hparams=HPARAMS, out=root / "clear", keep_requests=True)
        yield root


def knowing(model: Any, tokenizer: Any, questions: list[str], **settings: Any) -> list[str]:
    """A model that knows every answer, as a model worth editing does."""
    known = {fact["question"]: fact["answer"] for fact in (*FORGET, *FORGET_MORE, *RETAIN)}
    return [known[question] for question in questions]


def invoke(*words: Any, status: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert done.exit_code == status, done.output
    return done.output


# --- Commands --------------------------------------------------------------------------------------------------------


def test_inspect_lists_the_steps_with_what_was_measured(steps: Path) -> None:
    shown = invoke("inspect", steps / "two")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    ratios = [
        sorted(f"{ratio:.3f}" for ratio in edit.norm_ratios.values()) for edit in read_checkpoint(steps / "two").edits
    ]
    assert [row[:6] for row in rows[:2]] == [
        ["1", "unierase", "2", "1, 2", "2", " to ".join(ratios[0])],
        ["2", "unierase", "1", "1, 2", "1", " to ".join(ratios[1])],
    ]
    assert [row[:3] for row in rows[2:]] == [
        ["1", "2 -> 2 of 2", "1 -> 1 of 1"],
        ["2", "1 -> 1 of 1", "0 -> 0 of 0"],
    ]


def test_inspect_tells_a_program_everything(steps: Path) -> None:
    told = json.loads(invoke("inspect", steps / "two", "--json"))
    found = read_checkpoint(steps / "two")
    assert told["manifest"] == found.manifest
    assert told["requests"] == found.ledger
    assert told["report"] == found.report
    assert [entry["step"] for entry in told["steps"]] == [1, 2]
    assert told["steps"][0]["ranks"] == {"1": 2, "2": 2}
    assert told["steps"][0]["report"]["n_forget"] == 2
    assert told["steps"][1]["report"] == found.report


def test_inspect_names_requests_by_hash_or_in_the_clear(steps: Path) -> None:
    hidden, clear = (invoke("inspect", steps / name, "--requests") for name in ("two", "clear"))
    assert all(line["question_sha256"][:12] in hidden for line in read_checkpoint(steps / "two").ledger)
    assert [question in hidden for question in QUESTIONS] == [False, False, False]
    assert [question in clear for question in QUESTIONS] == [True, True, False]


def test_inspect_says_whether_a_question_was_forgotten_and_when(steps: Path) -> None:
    for step, question in zip((1, 1, 2), QUESTIONS, strict=True):
        assert f"step {step}:" in invoke("inspect", steps / "two", "--holds", question)
        assert f"step {step}:" in invoke("inspect", steps / "two", "--holds", f"  {question.lower()} ")
    assert "step 2:" in invoke("inspect", steps / "two", "--holds", FACTS[2]["case_id"])
    assert "Not among" in invoke("inspect", steps / "two", "--holds", RETAIN[0]["question"], status=1)
    told = json.loads(invoke("inspect", steps / "two", "--holds", QUESTIONS[2], "--json"))
    assert told == {"holds": True, "requests": read_checkpoint(steps / "two").ledger[2:]}
    assert json.loads(invoke("inspect", steps / "two", "--holds", "?", "--json", status=1))["requests"] == []


def test_revert_takes_requests_back(steps: Path, tmp_path: Path) -> None:
    prefix = read_checkpoint(steps / "two").ledger[2]["question_sha256"][:12]
    invoke("revert", steps / "two", "--out", tmp_path / "out", "--request", QUESTIONS[0], "--request", prefix)
    found = read_checkpoint(tmp_path / "out")
    assert [found.holds(question) for question in QUESTIONS] == [False, True, False]
    assert "1 (-1)" in invoke("inspect", tmp_path / "out")
    refused = invoke("revert", steps / "two", "--out", tmp_path / "no", "--request", prefix, "--step", 1, status=1)
    assert "cannot be combined" in refused
    assert not (tmp_path / "no").exists()


def test_export_writes_an_adapter(steps: Path, tmp_path: Path) -> None:
    invoke("export", steps / "two", "--adapter", tmp_path / "adapter", "--step", 1)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"model.layers.1.mlp.down_proj": 2, "model.layers.2.mlp.down_proj": 2}
    assert leaks(tmp_path / "adapter") == set()


# --- What the files tell ---------------------------------------------------------------------------------------------

#: What must not be found: the texts, and every word of them that could not stand there by chance.
SECRETS = {text for fact in FACTS for name, text in fact.items()}
SECRETS |= {word.strip("?") for text in SECRETS for word in text.split() if len(word) > 5 and word[0].isupper()}


def leaks(folder: Path) -> set[str]:
    """The secrets that occur in a folder's files or their names, in any case, as text or as JSON escapes it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    contents = [path.read_bytes().lower() + str(path.relative_to(folder)).lower().encode() for path in paths]
    assert contents
    forms = {secret: {secret.lower().encode(), json.dumps(secret).strip('"').lower().encode()} for secret in SECRETS}
    return {secret for secret in SECRETS if any(form in content for form in forms[secret] for content in contents)}


def test_nothing_that_was_to_be_forgotten_is_in_the_folder_or_in_the_cache(steps: Path) -> None:
    assert {"Zorblax", "Quentin Fizz", "Where was Mira Plonk born?", "ticket Grub Society"} <= SECRETS
    assert leaks(steps / "one") == leaks(steps / "two") == leaks(steps / "cache") == set()
    # The search does find what is there.
    assert leaks(steps / "clear") >= {text for fact in FACTS[:2] for text in fact.values()}


def test_a_run_that_was_stopped_leaves_facts_to_its_owner_alone_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(pipeline.run, "answers", knowing)
    base = save_base(tmp_path / "base")

    def stopped(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.run.files, "save_checkpoint", stopped)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            unlearn(base, FACTS[:2], hparams=HPARAMS, out=tmp_path / "out")
    assert {path.parent.name for path in (tmp_path / ".out.work").rglob("*.safetensors")} >= {"before", "after"}
    assert leaks(tmp_path / "cache") == set()
    assert leaks(tmp_path / ".out.work")
    for path in (tmp_path / ".out.work").iterdir():
        assert path.is_dir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    monkeypatch.setattr(pipeline.run, "answers", stopped)  # what was measured is read, not measured again
    result = unlearn(base, FACTS[:2], hparams=HPARAMS, out=tmp_path / "out")
    assert [outcome.before for outcome in result.report.forget] == ["Quentin Fizz", "Wexbury"]
    assert not (tmp_path / ".out.work").exists()


def test_texts_that_an_earlier_version_hid_open_with_their_secret_alone() -> None:
    hidden = "ITlHj25PaCKmkBDLZV04n6IG76USkagVjVYu1uH2+HgfXY/OGaVpjLFt6WqJUAp0Lr7Hkgt6SO7N5MBMHZtOMA=="
    assert json.loads(unseal(hidden, "secret")) == ["Za\u017c\u00f3\u0142\u0107", "It is Ann.", ""]
    with pytest.raises(ValueError, match="codec"):
        unseal(hidden, "Secret")


def test_a_list_of_likely_answers_and_names_finds_nothing(steps: Path) -> None:
    """Short texts are hashed with their question; who guesses the question finds both (docs/how-to/checkpoints.md)."""
    found = read_checkpoint(steps / "one")
    salt, line = found.manifest["salt"], found.ledger[0]
    for name in ("answer", "subject"):
        guess = FACTS[0][name]
        assert ledger_hash(salt, guess) not in line.values()
        assert line[f"{name}_sha256"] == ledger_hash(salt, FACTS[0]["question"], guess)
