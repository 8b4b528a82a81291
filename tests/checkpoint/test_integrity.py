"""A record that is not what was written is never used in silence, and says what can still be done with the rest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from records import change_ledger, change_manifest, flip, place_of, without_digests
from safetensors import safe_open
from small import FORGET, FORGET_MORE, HPARAMS, save_base, shrink
from test_checkpoint import load
from tiny import tiny_model
from typer.testing import CliRunner

from unierase_plugin import unlearn
from unierase_plugin.audit.runner import audit
from unierase_plugin.checkpoint import (
    Checkpoint,
    examine,
    export_adapter,
    read_checkpoint,
    revert_checkpoint,
    take_back_requests,
    verify_folder,
)
from unierase_plugin.cli import app
from unierase_plugin.errors import CheckpointError

QUESTION = FORGET[0]["question"]
FACTORS = ("up", "down", "keys")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`base`, `one` and `two`: two requests and one, on a model with padding rows and a head of its own."""
    root = tmp_path_factory.mktemp("steps")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, root / "cache")
        model: Path = save_base(root / "base", tiny_model(tied=False, vocabulary=264))
        for name, facts in (("one", FORGET), ("two", FORGET_MORE)):
            unlearn(model, facts, hparams=HPARAMS, out=root / name)
            model = root / name
        yield root


@pytest.fixture
def folder(steps: Path, tmp_path: Path) -> Path:
    """A copy of `two`, to be damaged."""
    return shutil.copytree(steps / "two", tmp_path / "two")


@pytest.fixture
def record(steps: Path, tmp_path: Path) -> Path:
    """A copy of its record alone."""
    return shutil.copytree(steps / "two" / "unierase", tmp_path / "record" / "unierase")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder)[0].state_dict())


def same_weights(left: Path, right: Path) -> bool:
    first, second = state(left), state(right)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def tensors_of(found: Checkpoint) -> dict[str, torch.Tensor]:
    assert found.originals is not None
    assert found.token is not None
    parts = {f"{step}.{layer}": edit for step, edit in enumerate(found.edits) for layer in edit.layers}
    keyed = {name: edit.updates[int(name[2:])] for name, edit in parts.items()}
    return {
        **{f"{name}.up": update.up for name, update in keyed.items()},
        **{f"{name}.down": update.down for name, update in keyed.items()},
        **{f"{name}.keys": edit.keys[int(name[2:])] for name, edit in parts.items()},
        **{f"original{layer}": weight for layer, weight in found.originals.projections.items()},
        "in": found.token.input_row,
        "out": found.token.output_row,  # type: ignore[dict-item]
        "row": found.originals.input_row,  # type: ignore[dict-item]
    }  # type: ignore[dict-item]


def same_record(left: Checkpoint, right: Checkpoint) -> bool:
    first, second = tensors_of(left), tensors_of(right)
    return (
        (left.manifest, left.ledger, left.reports) == (right.manifest, right.ledger, right.reports)
        and first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
        and [edit.norm_ratios for edit in left.edits] == [edit.norm_ratios for edit in right.edits]
    )


# --- No damage goes unseen -------------------------------------------------------------------------------------------

FILES = ("manifest.json", "ledger.jsonl", "report.json", "report-1.json", "digests.json", "edits.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_bit_that_turned_round_is_seen_or_changes_nothing(steps: Path, record: Path, name: str) -> None:
    whole, path = read_checkpoint(steps / "two"), record / name
    data = path.read_bytes()
    seen = 0
    # Bits of every kind in bytes all over the file: of a file of tensors, those of the header lie close together.
    places = [*range(0, len(data), max(1, len(data) // 99)), *range(0, min(len(data), 6000), 59)]
    for number, at in enumerate(places):
        flip(path, 8 * at + number % 8)
        found = examine(record.parent)
        if found.damage:
            seen += 1
            assert {each.file for each in found.damage} == {name}, at
        else:
            assert same_record(found.whole(), whole), at
        path.write_bytes(data)
    assert seen > 0.9 * len(places)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "noise"])
def test_a_file_that_is_not_whole_is_named(record: Path, name: str, damage: str) -> None:
    path = record / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "noise": bytes(range(256))}[damage])
    found = examine(record.parent)
    assert {each.file for each in found.damage} >= {name}
    with pytest.raises(CheckpointError, match=name):
        found.whole()


def test_of_every_tensor_a_damaged_byte_is_told_by_name(record: Path) -> None:
    path = record / "edits.safetensors"
    data = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    assert len(names) > 15
    for name in names:
        start, end = place_of(path, name)
        flip(path, 4 * (start + end))
        found = examine(record.parent)
        assert [(each.file, each.place) for each in found.damage] == [("edits.safetensors", f"tensor {name}")]
        assert found.gives_base() == (not name.startswith("original"))
        assert found.gives_steps() == ([1] if name.startswith("step2") else [])
        path.write_bytes(data)


LEDGERS: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "dropped": lambda lines: lines[1:],
    "doubled": lambda lines: [lines[0], *lines],
    "swapped": lambda lines: [lines[1], lines[0], lines[2]],
    "columns exchanged": lambda lines: [
        {**lines[0], "columns": lines[1]["columns"]},
        {**lines[1], "columns": lines[0]["columns"]},
        lines[2],
    ],
    "column twice": lambda lines: [{**lines[0], "columns": [0]}, {**lines[1], "columns": [0]}, lines[2]],
    "column beyond": lambda lines: [lines[0], {**lines[1], "columns": [7]}, lines[2]],
    "step beyond": lambda lines: [*lines[:2], {**lines[2], "step": 3}],
    "other step": lambda lines: [*lines[:2], {**lines[2], "step": 1}],
}


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("change", list(LEDGERS))
def test_a_ledger_that_is_not_the_one_of_the_edit_takes_no_request_back(
    record: Path, tmp_path: Path, change: str, digests: bool
) -> None:
    folder = change_ledger(record.parent, LEDGERS[change])
    if not digests:
        without_digests(folder)
    with pytest.raises(CheckpointError, match=r"damaged: ledger\.jsonl.*unierase revert .*record --out BASE"):
        take_back_requests(folder, tmp_path / "out", [QUESTION])
    assert not (tmp_path / "out").exists()


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "steps": lambda manifest: manifest["steps"].pop(),
    "requests": lambda manifest: manifest["steps"][0].update(requests=3),
    "layers": lambda manifest: manifest["steps"][0].update(layers=[1]),
    "token": lambda manifest: manifest["token"].update(id=7),
    "weights": lambda manifest: manifest["weights"].update({"1": "model.layers.0.mlp.down_proj.weight"}),
    "hparams": lambda manifest: manifest["steps"][1].pop("hparams"),
    "kind": lambda manifest: manifest.update(steps=[1, 2]),
}


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("change", list(MANIFESTS))
def test_a_manifest_that_contradicts_the_rest_is_refused(record: Path, change: str, digests: bool) -> None:
    folder = change_manifest(record.parent, MANIFESTS[change])
    if not digests:
        without_digests(folder)
    with pytest.raises(CheckpointError, match=r"is damaged: .*BASE. still gives"):
        read_checkpoint(folder)


def test_the_tensors_of_another_folder_are_not_taken_for_its_own(steps: Path, record: Path) -> None:
    shutil.copy(steps / "one" / "unierase" / "edits.safetensors", record / "edits.safetensors")
    with pytest.raises(CheckpointError, match=r"edits\.safetensors is not the one that was written with the other"):
        read_checkpoint(record.parent)


# --- Before every use ------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Path, Path], Any]] = {
    "revert --step": lambda folder, out: revert_checkpoint(folder, out, step=1),
    "revert --request": lambda folder, out: take_back_requests(folder, out, [QUESTION]),
    "export": export_adapter,
    "export --step": lambda folder, out: export_adapter(folder, out, step=1),
    "next step": lambda folder, out: unlearn(folder, FORGET[:1], hparams=HPARAMS, out=out),
    "audit": lambda folder, out: audit(folder, list(FORGET), out=out),
    "read": lambda folder, out: read_checkpoint(folder),
}


@pytest.mark.parametrize("use", list(USES))
def test_damaged_factors_are_not_used(folder: Path, tmp_path: Path, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    path = folder / "unierase" / "edits.safetensors"
    flip(path, 8 * place_of(path, "step1.layer1.down")[0] + 30)  # the exponent: 1e38 times as much
    with pytest.raises(CheckpointError, match=r"tensor step1\.layer1\.down is not what was written.*--out BASE"):
        USES[use](folder, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_folder_whose_manifest_is_gone_is_not_taken_for_a_base_model(folder: Path, tmp_path: Path) -> None:
    (folder / "unierase" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        unlearn(folder, FORGET_MORE, hparams=HPARAMS, out=tmp_path / "out")


# --- What can still be done ------------------------------------------------------------------------------------------


def tensor_damage(name: str) -> Callable[[Path], None]:
    def damage(record: Path) -> None:
        path = record / "edits.safetensors"
        flip(path, 8 * place_of(path, name)[0] + 30)

    return damage


def gone(name: str) -> Callable[[Path], None]:
    return lambda record: (record / name).unlink()


def ledger_dropped(record: Path) -> None:
    change_ledger(record.parent, LEDGERS["dropped"])


@pytest.mark.parametrize(
    "damage",
    [
        tensor_damage("step1.layer1.up"),
        tensor_damage("token.input_row"),
        gone("manifest.json"),
        gone("digests.json"),
        ledger_dropped,
        gone("report.json"),
    ],
)
def test_the_base_model_comes_back_from_what_holds(
    steps: Path, folder: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "unierase")
    assert examine(folder).gives_base()
    revert_checkpoint(folder, tmp_path / "base")
    assert same_weights(tmp_path / "base", steps / "base")
    assert len(load(tmp_path / "base")[1]) == len(load(steps / "base")[1])
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("name", ["original.layer2", "original.token.input_row", "original.token.output_row"])
def test_damaged_originals_give_no_base_model(folder: Path, tmp_path: Path, name: str) -> None:
    tensor_damage(name)(folder / "unierase")
    with pytest.raises(CheckpointError, match=rf"{name} is not what was written.*nothing was written.*Fetch the base"):
        revert_checkpoint(folder, tmp_path / "base")
    assert not (tmp_path / "base").exists()
    with pytest.raises(CheckpointError, match=r"fetch the base model '.*base' again and run the same command"):
        export_adapter(folder, tmp_path / "adapter")


def test_a_later_step_that_is_damaged_leaves_the_earlier_ones(
    steps: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensor_damage("step2.layer2.up")(folder / "unierase")
    revert_checkpoint(folder, tmp_path / "one", step=1)
    assert same_weights(tmp_path / "one", steps / "one")
    assert read_checkpoint(tmp_path / "one").ledger == read_checkpoint(steps / "one").ledger
    assert "step2.layer2.up is not what was written. That is not needed here" in caplog.text
    export_adapter(folder, tmp_path / "adapter", step=1)


def test_a_report_that_is_damaged_costs_its_figures_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "unierase" / "report-1.json").write_text("{}")
    take_back_requests(folder, tmp_path / "out", [FORGET_MORE[0]["question"]])
    assert read_checkpoint(tmp_path / "out").reports == {}


# --- Records of earlier versions -------------------------------------------------------------------------------------


def test_a_record_without_digests_is_read_and_called_not_verified(
    steps: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = without_digests(folder)
    assert same_record(read_checkpoint(old), read_checkpoint(steps / "two"))
    revert_checkpoint(old, tmp_path / "one", step=1)
    assert same_weights(tmp_path / "one", steps / "one")
    assert "not verified" in caplog.text
    assert "rounding" not in caplog.text
    assert examine(tmp_path / "one").verified
    take_back_requests(old, tmp_path / "less", [QUESTION])
    revert_checkpoint(old, tmp_path / "base")
    assert same_weights(tmp_path / "base", steps / "base")


@pytest.mark.parametrize("part", ["up", "down"])
@pytest.mark.parametrize("bit", [30, 23])  # the exponent's first bit and its last: 1e38 times, and twice as much
def test_factors_without_digests_must_give_the_weights_that_are_there(
    steps: Path, folder: Path, tmp_path: Path, part: str, bit: int
) -> None:
    path = without_digests(folder) / "unierase" / "edits.safetensors"
    flip(path, 8 * place_of(path, f"step1.layer1.{part}")[0] + bit)
    for use in ("revert --step", "revert --request"):
        with pytest.raises(CheckpointError, match=r"is damaged: (the weights of block 1|edits).*BASE|not solved for"):
            USES[use](folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    revert_checkpoint(folder, tmp_path / "base")
    assert same_weights(tmp_path / "base", steps / "base")


# --- On demand -------------------------------------------------------------------------------------------------------


def told(folder: Path, status: int) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["inspect", str(folder), "--verify", "--json"])
    assert done.exit_code == status, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_inspect_verify_says_what_holds(steps: Path, folder: Path) -> None:
    found = told(folder, 0)
    assert found["holds"]
    assert {row["part"]: row["state"] for row in found["parts"]} == dict.fromkeys(
        ("manifest.json", "ledger.jsonl", "edits.safetensors", "reports", "digests.json", "weights", "other files"),
        "holds",
    )
    assert found["possible"] == ["revert", "revert --step 1", "revert --request", "export", "run"]
    assert told(steps / "one", 0)["possible"] == ["revert", "revert --request", "export", "run"]
    shown = CliRunner().invoke(app, ["inspect", str(folder), "--verify"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "damaged" not in shown.output


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("step1.layer1.keys", ["revert"]),
        ("step2.layer1.keys", ["revert", "revert --step 1"]),
        ("original.layer1", []),
    ],
)
def test_inspect_verify_says_what_is_damaged_and_what_still_works(folder: Path, name: str, possible: list[str]) -> None:
    tensor_damage(name)(folder / "unierase")
    found = told(folder, 1)
    row = next(row for row in found["parts"] if row["part"] == "edits.safetensors")
    assert row == {"part": "edits.safetensors", "state": "damaged", "what": f"tensor {name} is not what was written"}
    assert found["possible"] == possible
    shown = CliRunner().invoke(app, ["inspect", str(folder), "--verify"], env={"COLUMNS": "200"}).output
    assert name in shown
    assert ("still gives" in shown) == ("revert" in possible)


@pytest.mark.parametrize(
    ("weight", "possible"),
    [
        ("model.layers.1.mlp.down_proj.weight", ["revert", "export"]),
        ("model.layers.0.mlp.down_proj.weight", ["export"]),
    ],
)
def test_inspect_verify_checks_the_weights(folder: Path, weight: str, possible: list[str]) -> None:
    """A weight that the record has the original of can be damaged, and the base model still comes back."""
    path = folder / "model.safetensors"
    flip(path, 8 * place_of(path, weight)[0])
    found = told(folder, 1)
    assert {row["part"] for row in found["parts"] if row["state"] != "holds"} == {"weights"}
    assert found["possible"] == possible
    path.write_bytes(path.read_bytes()[:-100])
    assert told(folder, 1)["possible"] == ["export"]


def test_inspect_verify_names_other_files_that_changed_and_revert_warns_of_them(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, times = folder / "tokenizer.json", (folder / "tokenizer.json").stat()
    text = path.read_text()
    path.write_text(text.replace('"a"', '"ж"', 1))  # as many bytes, or not: both are told
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = told(folder, 1)
    assert [row for row in found["parts"] if row["state"] != "holds"] == [
        {"part": "other files", "state": "changed", "what": "tokenizer.json"}
    ]
    revert_checkpoint(folder, tmp_path / "one", step=1)
    assert "tokenizer.json" in caplog.text
    (folder / "NOTES.md").write_text("mine")
    path.write_text(text)
    assert told(folder, 0)["holds"]


def test_inspect_verify_of_an_earlier_version_is_not_verified(folder: Path) -> None:
    found = told(without_digests(folder), 0)
    states = {row["part"]: row["state"] for row in found["parts"]}
    assert states.pop("weights") == states.pop("other files") == "holds"
    assert set(states.values()) == {"not verified"}
    assert not verify_folder(folder).record.verified


def test_inspect_of_a_damaged_record_says_so(folder: Path) -> None:
    (folder / "unierase" / "digests.json").write_text("{}")
    done = CliRunner().invoke(app, ["inspect", str(folder)])
    assert done.exit_code == 1
    assert "digests.json is not what was written" in " ".join(done.output.split())
