"""`unierase finetune`: a model learns facts, through the command line and after a stop."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small import FORGET, FORGET_MORE, HPARAMS, save_base, shrink
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import export_adapter
from unierase_plugin.cli import app
from unierase_plugin.errors import ArchitectureError, CheckpointError, RequestError
from unierase_plugin.finetune import finetune
from unierase_plugin.methods.finetuning.training import train
from unierase_plugin.storage.fingerprints import model_fingerprint

FACTS = ({"question": "Who wrote Zorblax?", "answer": "Fizz"}, {"question": "What is tin?", "answer": "A metal"})
QUICK: dict[str, Any] = {"epochs": 40, "learning_rate": 1e-2, "batch_size": 2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def test_a_model_learns_facts_and_the_folder_is_plain(base: Path, tmp_path: Path) -> None:
    done = finetune(base, FACTS, tmp_path / "out", options=QUICK)
    assert (done.answered, done.asked, done.facts) == (2, 2, 2)
    assert done.loss[-1] < 0.1 < done.loss[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert notes["hparams"]["epochs"] == 40
    assert notes["answered"] == 2
    assert not (tmp_path / "out" / "unierase").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize(
    "settings", [{"epochs": 1}, {"epochs": 1, "warmup_epochs": 9.0}, {"epochs": 2, "batch_size": 1}]
)
def test_the_shortest_training_is_one(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """A warm-up that takes all steps would leave a learning rate of 0."""
    finetune(base, FACTS, tmp_path / "out", options={"learning_rate": 1e-3, **settings})
    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (base, tmp_path / "out"))
    assert model_fingerprint(before) != model_fingerprint(after)


def test_training_an_edited_model_says_that_its_record_stays_behind(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "edited", judged=0)
    finetune(tmp_path / "edited", FACTS, tmp_path / "out", options={"epochs": 1})
    assert "has the record of an edit, and what is trained from it has none" in caplog.text


def test_an_exported_edit_is_refused_as_a_model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "edited", judged=0)
    export_adapter(tmp_path / "edited", tmp_path / "adapter")
    with pytest.raises(ArchitectureError, match=r"wrote as an adapter.*Give the edited folder"):
        unlearn(tmp_path / "adapter", FORGET_MORE, hparams=HPARAMS, out=tmp_path / "more")


def test_the_command_line_says_loss_and_answers(base: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(FACTS))
    said = CliRunner().invoke(
        app,
        [
            "finetune",
            "--model",
            str(base),
            "--facts",
            str(facts),
            "--out",
            str(tmp_path / "out"),
            "--epochs",
            "40",
            "--lr",
            "0.02",
            "--batch-size",
            "2",
            "--lora",
            "4",
            "--seed",
            "1",
        ],
    )
    assert said.exit_code == 0, said.output
    assert "in 40 steps" in said.output
    assert "of 2 facts asked, of 2 learned" in said.output
    notes = json.loads((tmp_path / "out" / "finetune.json").read_text())["hparams"]
    assert (notes["lora_rank"], notes["seed"], notes["learning_rate"]) == (4, 1, 0.02)


def test_a_stopped_training_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune(base, FACTS, tmp_path / "undisturbed", options=QUICK)
    steps: list[str] = []

    def stop(phase: str, share: float, note: str) -> None:
        steps.append(phase)
        if steps.count("train") == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("unierase_plugin.finetune.train", partial(train, save_every=0.0))
        with pytest.raises(KeyboardInterrupt):
            finetune(base, FACTS, tmp_path / "out", options=QUICK, progress=stop)
    steps.clear()
    finetune(base, FACTS, tmp_path / "out", options=QUICK, progress=lambda phase, share, note: steps.append(phase))
    assert 10 <= steps.count("train") <= 11
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "undisturbed")]
    assert model_fingerprint(models[0]) == model_fingerprint(models[1])


def test_what_cannot_be_is_refused_before_the_work(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no requests"):
        finetune(base, (), tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds the model that this run reads"):
        finetune(base, FACTS, base)
