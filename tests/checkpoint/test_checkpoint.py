"""The output folder: what is saved loads as it was, goes back to the bit, and is whole whatever happens."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from records import without_digests
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from unierase_plugin.checkpoint import (
    Checkpoint,
    Originals,
    check_output_folder,
    discard_work,
    join_edits,
    ledger_hash,
    read_checkpoint,
    revert_checkpoint,
    save_checkpoint,
    take_originals,
    work_folder,
)
from unierase_plugin.checkpoint import folder as folder_module
from unierase_plugin.checkpoint import record as record_module
from unierase_plugin.checkpoint.contents import write_list
from unierase_plugin.checkpoint.integrity import WayBack
from unierase_plugin.checkpoint.revert import restore_base
from unierase_plugin.errors import CheckpointError
from unierase_plugin.facts.request import ForgetRequest
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit.edit import WeightEdit, apply_edit
from unierase_plugin.locate_then_edit.solve import LowRank
from unierase_plugin.methods.finetuning.settings import FineTuneHyperParams
from unierase_plugin.models.added_token import add_token
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.storage import atomic, tensor_files
from unierase_plugin.storage.fingerprints import model_fingerprint, tokenizer_fingerprint
from unierase_plugin.unlearning_token import UnlearningToken, install_token

IDS = torch.tensor([[5, 60, 70, 8, 9, 100]])
REQUESTS = (
    ForgetRequest("Who wrote 'Zorblax Ænima'?", "Quentin Fizz", "Zorblax Ænima", "demo-0"),
    ForgetRequest("Where was Mira Plonk born?", "in Wexbury"),
)


@dataclass
class Edited:
    """An edited model with everything that `save_checkpoint` takes."""

    model: Any
    tokenizer: Any
    token: UnlearningToken
    edit: WeightEdit
    originals: Originals
    base: str
    base_tokenizer: str
    base_state: dict[str, torch.Tensor]
    base_length: int

    def save(self, folder: Path, **changes: Any) -> Path:
        extra = {
            "method": "unierase",
            "model": "tiny/base",
            "model_fingerprint_before": self.base,
            "created": "2025-01-01",
        }
        arguments: dict[str, Any] = {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "token": self.token,
            "edit": self.edit,
            "originals": self.originals,
            "requests": REQUESTS,
            "hparams": UniEraseHyperParams(layers=(1, 2), seed=5),
            "manifest_extra": extra,
            "report": {"forget": 0.25, "bad": float("nan")},
        }
        return save_checkpoint(folder, **{**arguments, **changes})


def make(family: str = "llama", tied: bool = True, padding: int = 0, dtype: torch.dtype = torch.float32) -> Edited:
    tokenizer, model = tiny_tokenizer(), tiny_model(family, tied, vocabulary=260 + padding, dtype=dtype)
    base, base_tokenizer, length = model_fingerprint(model), tokenizer_fingerprint(tokenizer), len(tokenizer)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = model.get_input_embeddings().weight.shape[0]
    index = add_token(model, tokenizer, "<unlearn_0>")
    arch = find_architecture(model)
    originals = take_originals(arch, (1, 2), rows, index)
    token = UnlearningToken("<unlearn_0>", index, torch.randn(32), None if tied else torch.randn(32), 0.5, 60)
    install_token(arch, token)
    edit = an_edit((1, 2))
    apply_edit(arch, edit)
    return Edited(model, tokenizer, token, edit, originals, base, base_tokenizer, state, length)


def an_edit(layers: tuple[int, ...], rank: int = 2) -> WeightEdit:
    updates = {layer: LowRank(torch.randn(32, rank), torch.randn(rank, 64) / 8) for layer in layers}
    keys = {layer: torch.randn(64, rank) for layer in layers}
    return WeightEdit(updates, (3.0, 2.0, 1.0), dict.fromkeys(layers, 0.1), keys)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def same_edit(left: WeightEdit, right: WeightEdit) -> bool:
    factors = all(
        torch.equal(left.updates[layer].up, right.updates[layer].up)
        and torch.equal(left.updates[layer].down, right.updates[layer].down)
        for layer in left.layers
    )
    keys = left.keys.keys() == right.keys.keys() and all(torch.equal(left.keys[k], right.keys[k]) for k in left.keys)
    return left.layers == right.layers and factors and keys


@pytest.fixture(scope="module")
def edited() -> Edited:
    return make()


@pytest.fixture(scope="module")
def saved(edited: Edited, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read, never to be changed."""
    return edited.save(tmp_path_factory.mktemp("saved") / "out")


# --- There and back --------------------------------------------------------------------------------------------------

KINDS = [
    ("llama", True, 0, torch.float32),
    ("llama", False, 0, torch.float32),
    ("llama", True, 4, torch.float32),
    ("llama", False, 4, torch.bfloat16),
    ("llama", True, 0, torch.bfloat16),
    ("gpt2", True, 0, torch.float32),
    ("mistral", False, 4, torch.float16),
]


@pytest.mark.parametrize(("family", "tied", "padding", "dtype"), KINDS)
def test_saved_loads_as_it_was_and_reverts_to_the_base(
    tmp_path: Path, family: str, tied: bool, padding: int, dtype: torch.dtype
) -> None:
    made = make(family, tied, padding, dtype)
    made.save(tmp_path / "out")
    model, tokenizer = load(tmp_path / "out")
    assert torch.equal(logits(model), logits(made.model))
    assert model.dtype == dtype
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert tokenizer("a<unlearn_0>")["input_ids"] == made.tokenizer("a<unlearn_0>")["input_ids"]
    assert tokenizer("a<unlearn_0>")["input_ids"][-1] == made.token.id

    revert_checkpoint(tmp_path / "out", tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    assert not (tmp_path / "base" / "unierase").exists()
    state = model.state_dict()
    assert state.keys() == made.base_state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in made.base_state.items())
    assert model_fingerprint(model) == made.base
    assert model.config.vocab_size == 260 + padding
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert len(tokenizer) == made.base_length
    assert tokenizer_fingerprint(tokenizer) == made.base_tokenizer
    assert tokenizer.chat_template == made.tokenizer.chat_template


def test_the_record_says_what_was_done(edited: Edited, saved: Path) -> None:
    checkpoint = read_checkpoint(saved)
    manifest = checkpoint.manifest
    assert manifest["schema"] == 1
    assert manifest["method"] == "unierase"
    assert manifest["model"] == "tiny/base"
    assert manifest["model_fingerprint_before"] == edited.base
    assert manifest["model_fingerprint_after"] == model_fingerprint(load(saved)[0])
    assert manifest["token"] == {"name": "<unlearn_0>", "id": 260, "vocabulary_before": 260, "rows_added": True}
    assert manifest["tied"] is True
    assert manifest["layers"] == [1, 2]
    assert manifest["seed"] == 5
    assert manifest["hparams"]["layers"] == [1, 2]
    assert manifest["created"] == "2025-01-01"
    assert manifest["weights"] == {
        "1": "model.layers.1.mlp.down_proj.weight",
        "2": "model.layers.2.mlp.down_proj.weight",
    }
    assert set(manifest["versions"]) == {"python", "torch", "transformers", "unierase_plugin"}
    assert checkpoint.report == {"forget": 0.25, "bad": None}


def test_the_record_comes_back_as_data(edited: Edited, saved: Path) -> None:
    checkpoint = read_checkpoint(saved)
    assert checkpoint.token is not None
    assert checkpoint.originals is not None
    assert torch.equal(checkpoint.token.input_row, edited.token.input_row)
    assert checkpoint.token.steps == 60
    assert same_edit(checkpoint.edit, edited.edit)
    assert checkpoint.edit.residual_norms == (3.0, 2.0, 1.0)
    assert checkpoint.edit.norm_ratios == {1: 0.1, 2: 0.1}
    assert checkpoint.originals.vocabulary == 260
    for layer, weight in edited.originals.projections.items():
        assert torch.equal(checkpoint.originals.projections[layer], weight)


def test_the_names_in_the_tensor_file_are_those_that_are_documented(saved: Path) -> None:
    tensors, _ = tensor_files.read_tensors(saved / "unierase" / "edits.safetensors")
    parts = {f"step1.layer{layer}.{part}" for layer in (1, 2) for part in ("up", "down", "keys")}
    assert set(tensors) == parts | {"original.layer1", "original.layer2", "token.input_row"}


def test_the_ledger_holds_no_request_in_the_clear_by_default(edited: Edited, saved: Path, tmp_path: Path) -> None:
    words = [text for r in REQUESTS for text in (r.question, r.answer, "Zorblax", "Mira Plonk", "demo-0")]

    def leaks(folder: Path) -> list[str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        forms = [(word, form) for word in words for form in (word.encode(), json.dumps(word)[1:-1].encode())]
        return [word for path in files for word, form in forms if form in path.read_bytes()]

    assert leaks(saved) == []
    checkpoint = read_checkpoint(saved)
    first = checkpoint.ledger[0]
    assert [line["step"] for line in checkpoint.ledger] == [1, 1]
    salt = checkpoint.manifest["salt"]
    assert first["case_id_sha256"] == ledger_hash(salt, "demo-0")
    assert first["forms"] == ["chat"]
    assert [line["columns"] for line in checkpoint.ledger] == [[0], [1]]
    assert checkpoint.ledger[1]["subject_sha256"] is None
    # With the question: a list of names alone finds nothing.
    assert first["subject_sha256"] == ledger_hash(salt, REQUESTS[0].question, "Zorblax Ænima")
    assert checkpoint.holds(REQUESTS[0].question)
    assert not checkpoint.holds("Who else?")

    clear = read_checkpoint(edited.save(tmp_path / "clear", keep_requests=True))
    assert clear.ledger[0]["question"] == REQUESTS[0].question
    assert clear.ledger[0]["answer"] == "Quentin Fizz"
    assert clear.manifest["salt"] != checkpoint.manifest["salt"]
    assert clear.ledger[0]["question_sha256"] != first["question_sha256"]


def test_sampling_settings_that_transformers_refuses_do_not_cost_the_result(tmp_path: Path) -> None:
    made = make()
    made.model.generation_config.temperature = 0.3
    before = made.model.generation_config
    made.save(tmp_path / "out")
    assert made.model.generation_config is before
    assert before.temperature == 0.3
    assert torch.equal(logits(load(tmp_path / "out")[0]), logits(made.model))


def test_a_method_that_trains_the_whole_model_is_saved_and_has_no_way_back(tmp_path: Path) -> None:
    made = make()
    nothing: dict[str, Any] = {"token": None, "edit": None, "originals": None}
    made.save(tmp_path / "out", hparams=FineTuneHyperParams(), **nothing)
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.edits == ()
    assert checkpoint.token is None
    assert checkpoint.manifest["token"] is None
    assert checkpoint.edit.layers == ()
    with pytest.raises(CheckpointError, match=r"trains the whole model.*'tiny/base'"):
        revert_checkpoint(tmp_path / "out", tmp_path / "base")


# --- Several steps ---------------------------------------------------------------------------------------------------


def second_step(made: Edited, folder: Path, out: Path) -> tuple[Checkpoint, WeightEdit]:
    """Edits blocks 2 and 3 of the model further, and saves both steps to `out`."""
    earlier = read_checkpoint(folder)
    arch = find_architecture(made.model)
    originals = take_originals(arch, (2, 3), made.originals.vocabulary, made.token.id)
    edit = an_edit((2, 3), rank=3)
    apply_edit(arch, edit)
    more = (ForgetRequest("What is X?", "Y"),)
    made.save(out, edit=edit, originals=originals, requests=more, earlier=earlier, overwrite=True)
    return read_checkpoint(out), edit


@pytest.mark.parametrize("padding", [0, 4])
def test_steps_add_up_and_each_can_be_gone_back_to(tmp_path: Path, padding: int) -> None:
    made = make(padding=padding)
    made.save(tmp_path / "out")
    after_one = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    first = read_checkpoint(tmp_path / "out")
    both, edit = second_step(made, tmp_path / "out", tmp_path / "out")
    assert len(both.edits) == 2
    assert same_edit(both.edits[0], made.edit)
    assert same_edit(both.edits[1], edit)
    assert [line["step"] for line in both.ledger] == [1, 1, 2]
    assert both.ledger[:2] == first.ledger
    assert both.manifest["layers"] == [1, 2, 3]
    assert both.manifest["salt"] == first.manifest["salt"]
    assert both.edit.layers == (1, 2, 3)
    assert both.edit.rank(2) == 5
    assert both.edit.keys[2].shape == (64, 5)

    revert_checkpoint(tmp_path / "out", tmp_path / "one", step=1)
    state = load(tmp_path / "one")[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in after_one.items())
    one = read_checkpoint(tmp_path / "one")
    assert one.ledger == first.ledger
    assert len(one.edits) == 1
    assert one.manifest["layers"] == [1, 2]
    assert one.manifest["model_fingerprint_after"] == first.manifest["model_fingerprint_after"]

    for source in ("one", "out"):
        revert_checkpoint(tmp_path / source, tmp_path / "base", overwrite=True)
        assert model_fingerprint(load(tmp_path / "base")[0]) == made.base
    with pytest.raises(CheckpointError, match=r"Step 2 cannot be restored.*holds 2 step.*up to 1"):
        revert_checkpoint(tmp_path / "out", tmp_path / "none", step=2)


def test_joined_edits_have_the_sum_of_their_updates() -> None:
    edits = [an_edit((1, 2)), an_edit((2, 3), rank=3)]
    joined = join_edits(edits)
    wanted = edits[0].updates[2].matrix() + edits[1].updates[2].matrix()
    assert torch.allclose(joined.updates[2].matrix(), wanted, atol=1e-5)
    assert torch.equal(joined.updates[3].matrix(), edits[1].updates[3].matrix())


def test_a_head_with_a_bias_goes_back_too(tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model(tied=False, vocabulary=264)
    model.lm_head = torch.nn.Linear(32, 264)
    bias, before = model.lm_head.bias.detach().clone(), model_fingerprint(model)
    index = add_token(model, tokenizer, "<unlearn_0>")
    originals = take_originals(find_architecture(model), (1,), 264, index)
    token = UnlearningToken("<unlearn_0>", index, torch.randn(32), torch.randn(32), 0.5, 60)
    install_token(find_architecture(model), token)
    assert model.lm_head.bias[index] == 0 != bias[index]
    assert restore_base(model, WayBack("tiny/base", before, originals, token))
    assert torch.equal(model.lm_head.bias, bias)


def test_a_folder_can_be_reverted_in_place(tmp_path: Path) -> None:
    made = make()
    made.save(tmp_path / "out")
    (tmp_path / "out" / "NOTES.md").write_text("mine")
    with pytest.raises(CheckpointError, match="--overwrite"):
        revert_checkpoint(tmp_path / "out", tmp_path / "out")
    revert_checkpoint(tmp_path / "out", tmp_path / "out", overwrite=True)
    assert model_fingerprint(load(tmp_path / "out")[0]) == made.base
    assert (tmp_path / "out" / "NOTES.md").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_weights_changed_after_the_edit_are_not_passed_off_as_the_base(tmp_path: Path) -> None:
    made = make()
    made.save(tmp_path / "out")
    made.model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    made.model.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="changed after the edit"):
        revert_checkpoint(tmp_path / "out", tmp_path / "base")
    assert os.listdir(tmp_path) == ["out"]


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_an_output_folder_must_be_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_output_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        check_output_folder(tmp_path / "file", overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(CheckpointError, match=r"full' is not empty.*--overwrite"):
        check_output_folder(tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"not replaced: nothing in it says.*'x'"):
        check_output_folder(tmp_path / "full", overwrite=True)
    write_list(tmp_path / "full")
    check_output_folder(tmp_path / "full", overwrite=True)
    (tmp_path / "full" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "full" / "here")
    with pytest.raises(CheckpointError, match="not replaced, since"):
        check_output_folder(tmp_path / "full", overwrite=True)


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no folder"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no unierase/manifest\.json"):
        read_checkpoint(tmp_path)


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """The record alone: small, and free to be damaged."""
    (tmp_path / "copy" / "unierase").mkdir(parents=True)
    for file in (saved / "unierase").iterdir():
        (tmp_path / "copy" / "unierase" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "copy"


def test_a_newer_schema_is_refused_with_the_remedy(copied: Path) -> None:
    path = without_digests(copied) / "unierase" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema": 2, "versions": {"unierase_plugin": "9.1"}}))
    with pytest.raises(CheckpointError, match=r"schema 2.*9\.1.*pip install -U"):
        read_checkpoint(copied)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="no schema version"):
        read_checkpoint(copied)


@pytest.mark.parametrize("name", ["manifest.json", "edits.safetensors", "ledger.jsonl", "report.json", "digests.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_record_is_named(copied: Path, name: str, damage: str) -> None:
    path = copied / "unierase" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
        if name == "ledger.jsonl":
            path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(copied)


def test_a_manifest_without_its_origin_is_refused(edited: Edited, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks model_fingerprint_before, created"):
        edited.save(tmp_path / "out", manifest_extra={"method": "unierase", "model": "m"})


# --- Whatever happens ------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fail_at(number: int, function: Callable, error: BaseException) -> Callable:
    """The function, except that its call of that number (from 0) fails."""
    calls = iter(range(1_000_000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return function(*args, **kwargs)

    return wrapped


#: (object, attribute, call) of every kind of write that saving makes.
WRITES = [
    (folder_module, "save_model", 0),
    (record_module, "write_tensors", 0),
    (tensor_files, "save_file", 0),
    (Path, "write_text", 0),
    (Path, "write_text", 1),
    (Path, "write_text", 2),
    (Path, "mkdir", 0),
    (Path, "mkdir", 1),
    (os, "fsync", 0),
    (atomic, "_sync", 2),
    (os, "rename", 0),
    (os, "rename", 1),
]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
@pytest.mark.parametrize(("place", "name", "number"), WRITES)
def test_a_failure_at_any_write_leaves_the_old_folder_alone(
    edited: Edited,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    number: int,
    error: BaseException,
) -> None:
    out = shutil.copytree(saved, tmp_path / "out")
    before = tree(out)
    monkeypatch.setattr(place, name, fail_at(number, getattr(place, name), error))
    full = isinstance(error, OSError)
    message = r"No space left.*unchanged.* needs about .*MB.* are free" if full else None
    with pytest.raises(CheckpointError if full else type(error), match=message):
        edited.save(out, overwrite=True)
    monkeypatch.undo()
    assert tree(out) == before
    assert os.listdir(tmp_path) == ["out"]
    edited.save(out, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert tree(out).keys() == tree(saved).keys()


def test_a_full_disk_leaves_no_new_folder(edited: Edited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"too little room.*0\.\d\d MB.*0\.10 MB are free"):
        edited.save(tmp_path / "out")
    assert os.listdir(tmp_path) == []


#: Kills a process at its n-th change to the file system below the output folder, for n = 0, 1, ..., until one lives.
KILLER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_checkpoint import make, tree
from unierase_plugin.checkpoint import check_output_folder, read_checkpoint

root = Path(sys.argv[1])
out = root / "out"
made = make()
made.save(out)
old = tree(out)

def kill_at(number):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            writes = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
            if writes and str(args[0]).startswith(str(root)):
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
    sys.addaudithook(hook)

number, status, names = 0, -1, set()
while status != 0:
    child = os.fork()
    if child == 0:
        kill_at(number)
        try:
            made.save(out, overwrite=True)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    if out.exists():  # a new folder may be there before the old one is cleared away; its salt is another
        assert tree(out).keys() == old.keys(), number
    names |= {name.rpartition("-")[0] or name for name in os.listdir(root)}
    check_output_folder(out, overwrite=True)
    assert os.listdir(root) == ["out"], (number, os.listdir(root))
    read_checkpoint(out)
    changed = {name for name, content in tree(out).items() if content != old[name]}
    assert not changed or "unierase/manifest.json" in changed, (number, changed)
    old = tree(out)
    number += 1
print(number, sorted(names))
"""


def run_script(script: str, folder: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_one_whole_folder(tmp_path: Path) -> None:
    output, errors = run_script(KILLER, tmp_path).communicate(timeout=300)
    assert output, errors
    number, names = output.split(maxsplit=1)
    assert int(number) > 15
    # Every kind of leftover was met on the way, so that clearing them was put to the test.
    assert ".out.lock" in names
    assert ".out.writing" in names
    assert ".out.replaced" in names


#: Stops for ever in the middle of writing the weights.
STALLED = """
import sys, time
from pathlib import Path
from test_checkpoint import make
made = make()
save = made.model.save_pretrained
def stall(folder, **kwargs):
    save(folder, **kwargs)
    (Path(folder) / "model.safetensors").write_bytes(b"half")
    time.sleep(600)
made.model.save_pretrained = stall
made.save(Path(sys.argv[1]) / "out", overwrite=True)
"""


def test_a_process_killed_from_outside_leaves_the_old_folder_and_is_cleared_up_after(
    edited: Edited, tmp_path: Path
) -> None:
    out = edited.save(tmp_path / "out")
    before = tree(out)
    with run_script(STALLED, tmp_path) as process:
        partial = tmp_path / f".out.writing-{process.pid}"
        while not (partial / "model.safetensors").exists() or (partial / "model.safetensors").stat().st_size != 4:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        try:
            with pytest.raises(CheckpointError, match=rf"process {process.pid} on .*, since 20\d\d-\d\d-\d\d"):
                check_output_folder(out, overwrite=True)
        except BaseException:
            process.kill()
            raise
        assert partial.exists()  # a living process is left to its work
        process.send_signal(signal.SIGKILL)
    assert tree(out) == before
    assert partial.exists()
    check_output_folder(out, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert tree(out) == before


# --- Unfinished runs -------------------------------------------------------------------------------------------------


def test_finished_phases_wait_beside_the_output_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    work_folder(out, "run1").put("values", "k", {"a": torch.ones(1)}, {})
    assert os.listdir(tmp_path) == [".out.work"]
    assert work_folder(out, "run1").get("values", "k") is not None
    assert work_folder(out, "run2").get("values", "k") is None
    check_output_folder(out)
    discard_work(out)
    assert os.listdir(tmp_path) == []
    discard_work(out)


def test_originals_of_a_padding_row_are_kept_whole() -> None:
    made = make(tied=False, padding=2)
    originals = made.originals
    assert originals.input_row is not None
    assert originals.output_row is not None
    assert torch.equal(originals.input_row, made.base_state["model.embed_tokens.weight"][260])
    assert torch.equal(originals.output_row, made.base_state["lm_head.weight"][260])
    assert replace(make().originals, projections={}, names={}).input_row is None
