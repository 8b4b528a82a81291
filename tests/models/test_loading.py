"""A checkpoint that does not hold all of its model is refused, whoever opens it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import FORGET, HPARAMS, save_base, shrink
from tiny import tiny_model
from torch import Tensor
from typer.testing import CliRunner

from unierase_plugin import unlearn
from unierase_plugin.cli import app
from unierase_plugin.errors import UniEraseError
from unierase_plugin.models.loading import load

LOST = "model.layers.1.mlp.down_proj.weight"


def changed(folder: Path, how: str) -> Path:
    """The folder with another set of weights."""
    path = folder / "model.safetensors"
    weights: dict[str, Tensor] = load_file(path)
    if how == "a prefix":
        weights = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
    elif how == "a weight":
        del weights[LOST]
    elif how == "the head":
        del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("a prefix", r"does not hold .* and others: 39 of 39 .* It has _orig_mod\..* instead.*model\._orig_mod"),
        ("a weight", rf"does not hold {LOST}: 1 of 39 weights would be drawn at random\. Save"),
    ],
)
def test_weights_that_are_not_there_are_named(how: str, says: str, tied: bool, tmp_path: Path) -> None:
    folder = changed(save_base(tmp_path / "base", tiny_model(tied=tied)), how)
    with pytest.raises(UniEraseError, match=says):
        load(folder)


def test_a_head_is_missing_only_where_it_is_not_tied(tmp_path: Path) -> None:
    tied, untied = (save_base(tmp_path / str(tied), tiny_model(tied=tied)) for tied in (True, False))
    model, _ = load(tied)
    wanted = tiny_model(tied=True).state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items())
    with pytest.raises(UniEraseError, match=r"does not hold lm_head\.weight: 1 of 39"):
        load(changed(untied, "the head"))


@pytest.mark.parametrize("command", ["run", "stats", "finetune", "audit"])
def test_no_command_goes_on_with_drawn_weights(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    base = save_base(tmp_path / "base")
    (tmp_path / "facts.json").write_text(json.dumps(FORGET))
    if command == "audit":  # the base that a folder was edited from
        unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "edited")
    changed(base, "a weight")
    facts, out = str(tmp_path / "facts.json"), str(tmp_path / "out")
    arguments = {
        "run": ["--model", str(base), "--forget", facts, "--out", out],
        "stats": ["--model", str(base)],
        "finetune": ["--model", str(base), "--facts", facts, "--out", out],
        "audit": ["--model", str(tmp_path / "edited"), "--base", str(base), "--forget", facts, "--out", out],
    }[command]
    found = CliRunner().invoke(app, [command, *arguments])
    assert found.exit_code == 1, found.output
    assert "would be drawn" in " ".join(found.output.split())
