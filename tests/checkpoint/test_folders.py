"""Output folders: only what the package wrote is replaced, one run at a time writes, and no step is applied twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small import FORGET, FORGET_MORE, FORGET_OTHERS, HPARAMS, save_base, shrink
from typer.testing import CliRunner

from unierase_plugin import pipeline, unlearn
from unierase_plugin.audit.runner import audit
from unierase_plugin.checkpoint import export_adapter, read_checkpoint, revert_checkpoint, take_back_requests
from unierase_plugin.checkpoint import place as place_module
from unierase_plugin.checkpoint.companions import LARGEST, carry_companions
from unierase_plugin.checkpoint.contents import LIST
from unierase_plugin.cli import app
from unierase_plugin.cli.demo import refuse_foreign_folder
from unierase_plugin.cli.stats import stats
from unierase_plugin.compare.entries import parse_methods
from unierase_plugin.compare.runner import compare
from unierase_plugin.errors import CheckpointError, StepAppliedError, UniEraseError
from unierase_plugin.facts.resources import demo_facts
from unierase_plugin.finetune import finetune
from unierase_plugin.statistics.second_moment import SecondMoment
from unierase_plugin.storage.locks import folder_lock
from unierase_plugin.storage.tensor_files import pack, write_tensors

#: A command as a function of the world and its output folder, with overwrite set.
Command = Callable[["World", Path], Any]
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 2}


class World:
    """A place with a base model and an edited one of two steps, which a test may change."""

    def __init__(self, root: Path) -> None:
        self.root, self.base, self.edited, self.out = root, root / "base", root / "edited", root / "out"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    save_base(root / "base")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, root / "cache")
        unlearn(root / "base", FORGET, hparams=HPARAMS, out=root / "first", judged=0)
        unlearn(root / "first", FORGET_MORE, hparams=HPARAMS, out=root / "edited", judged=0)
    shutil.rmtree(root / "first")
    return root


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    shutil.copytree(made, tmp_path / "world")
    shrink(monkeypatch, tmp_path / "world" / "cache")
    return World(tmp_path / "world")


def run(world: World, out: Path) -> Any:
    return unlearn(world.base, FORGET, hparams=HPARAMS, out=out, overwrite=True, judged=0)


COMMANDS: dict[str, Command] = {
    "run": run,
    "finetune": lambda world, out: finetune(world.base, FORGET, out, options=QUICK, overwrite=True, asked=0),
    "revert": lambda world, out: revert_checkpoint(world.edited, out, overwrite=True),
    "revert --step": lambda world, out: revert_checkpoint(world.edited, out, overwrite=True, step=1),
    "revert --request": lambda world, out: take_back_requests(
        world.edited, out, [FORGET[0]["question"]], overwrite=True
    ),
    "export": lambda world, out: export_adapter(world.edited, out, overwrite=True),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(command: Command, world: World, out: Path, *says: str) -> str:
    """The message; nothing has changed."""
    before = tree(world.root)
    with pytest.raises(CheckpointError) as caught:
        command(world, out)
    assert tree(world.root) == before
    for text in says:
        assert text in str(caught.value)
    return str(caught.value)


# --- what goes when a folder is replaced -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_a_command_wrote_is_replaced_and_what_others_put_there_is_not(command: Command, world: World) -> None:
    command(world, world.out)
    written = tree(world.out).keys()
    command(world, world.out)
    assert tree(world.out).keys() == written
    (world.out / "notes").mkdir()
    (world.out / "notes" / "thesis.md").write_text("mine")
    refused(command, world, world.out, "'notes/thesis.md', which this package did not write there. Move")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_folder_that_no_run_wrote_is_not_replaced(command: Command, world: World) -> None:
    shutil.copytree(world.base, world.out)
    message = refused(command, world, world.out, "nothing in it says that this package wrote it", "Choose another")
    assert re.search(r"'[\w.]+', '[\w.]+', '[\w.]+' and \d+ more", message)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_was_changed_since_is_somebodys(command: Command, world: World) -> None:
    command(world, world.out)
    weights = next(world.out.glob("*model.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(command, world, world.out, f"'{weights.name}', changed since this package wrote it")
    # Another time alone, as after a copy, is no change.
    weights.write_bytes(content)
    command(world, world.out)


@pytest.mark.parametrize("command", ["run", "finetune", "revert --step", "export"])
def test_folders_of_versions_without_a_list_are_replaced_where_that_is_safe(command: str, world: World) -> None:
    COMMANDS[command](world, world.out)
    (world.out / LIST).unlink()
    (world.out / "LICENSE").write_text("free")
    refused(COMMANDS[command], world, world.out, "'LICENSE', which this package did not write there")
    (world.out / "LICENSE").unlink()
    COMMANDS[command](world, world.out)
    assert (world.out / LIST).is_file()


def test_a_model_that_was_taken_back_by_a_version_without_a_list_is_nobodys(world: World) -> None:
    revert_checkpoint(world.edited, world.out)
    (world.out / LIST).unlink()
    refused(COMMANDS["revert"], world, world.out, "nothing in it says that this package wrote it")


#: What a run reads, and where in the output folder it lies; files that a run of ours wrote there among them.
INPUTS: dict[str, tuple[Command, str]] = {
    "the model": (lambda w, out: unlearn(out / "m", FORGET, hparams=HPARAMS, out=out, overwrite=True), "m"),
    "the facts to forget": (
        lambda w, out: unlearn(w.base, f"{out / 'f.json'}[0:2]", hparams=HPARAMS, out=out, overwrite=True),
        "f.json",
    ),
    "the facts to keep": (
        lambda w, out: unlearn(w.base, FORGET, retain=out / "f.json", hparams=HPARAMS, out=out, overwrite=True),
        "f.json",
    ),
    "the hyper-parameters": (
        lambda w, out: unlearn(w.base, FORGET, hparams=out / "h.yaml", out=out, overwrite=True),
        "h.yaml",
    ),
    "the corpus": (
        lambda w, out: unlearn(w.base, FORGET, hparams=HPARAMS, corpus=str(out / "t.txt"), out=out, overwrite=True),
        "t.txt",
    ),
    "the facts": (
        lambda w, out: finetune(w.base, str(out / "f.json"), out, options=QUICK, overwrite=True),
        "f.json",
    ),
    "the edited model": (lambda w, out: export_adapter(out / "m", out, overwrite=True), "m"),
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("what", INPUTS)
def test_a_folder_with_an_input_of_the_run_is_not_replaced(what: str, listed: bool, world: World) -> None:
    command, name = INPUTS[what]
    run(world, world.out)
    inside = world.out / name
    if name == "m":
        shutil.copytree(world.edited, inside)
    else:
        facts = [{"question": "Who built Krandor Gate?", "answer": "Ulla Vren", "subject": "Krandor Gate"}] * 1
        inside.write_text(json.dumps(facts) if name.endswith("json") else "{}")
    if listed:  # as if we had written it
        place_module.write_list(world.out)  # type: ignore[attr-defined]
    refused(command, world, world.out, f"holds {what} that this run reads: '{inside}")


def test_the_base_of_an_adapter_is_an_input_too(world: World) -> None:
    COMMANDS["finetune"](world, world.out)
    adapter = world.root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(world.out)}))
    refused(
        lambda w, out: unlearn(adapter, FORGET, hparams=HPARAMS, out=out, overwrite=True),
        world,
        world.out,
        "holds the base of the model that this run reads",
    )


@pytest.mark.parametrize(
    "command",
    [
        lambda w, out: unlearn(out, FORGET, hparams=HPARAMS, out=out, overwrite=True),
        lambda w, out: finetune(out, FORGET, out, options=QUICK, overwrite=True),
    ],
    ids=["run", "finetune"],
)
@pytest.mark.parametrize("ours", [True, False])
def test_a_model_without_a_record_is_not_replaced_by_what_is_made_of_it(
    command: Command, ours: bool, world: World
) -> None:
    if ours:
        COMMANDS["finetune"](world, world.out)
    else:
        shutil.copytree(world.base, world.out)
    refused(command, world, world.out, "holds the model that this run reads")


def test_an_edited_folder_is_not_replaced_by_its_own_adapter(world: World) -> None:
    (world.root / "link").symlink_to(world.edited)
    for named in (world.edited, world.root / "link", world.edited / ".." / "edited"):
        refused(
            lambda w, out: export_adapter(w.edited, out, overwrite=True), world, named, "the edited model that this"
        )
    assert export_adapter(world.edited, world.edited / "adapter").is_dir()


def test_a_link_is_followed_and_what_is_linked_in_is_no_file_of_ours(world: World) -> None:
    run(world, world.out)
    (world.root / "link").symlink_to(world.out)
    run(world, world.root / "link")
    assert (world.root / "link").is_symlink()
    (world.root / "elsewhere").mkdir()
    (world.root / "elsewhere" / "data.txt").write_text("mine")
    (world.out / "data").symlink_to(world.root / "elsewhere")
    refused(run, world, world.root / "link", "'data', which this package did not write there")


def test_a_record_is_no_place_for_an_output(world: World) -> None:
    for place in ("unierase", "unierase/new"):
        refused(run, world, world.edited / place, "is inside the record of an edit")


def test_what_appears_during_the_run_is_seen_before_the_folder_is_replaced(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(world, world.out)
    weights = (world.out / "model.safetensors").read_bytes()

    def late(phase: str, share: float, note: str) -> None:
        if phase == "save" and share == 0:
            (world.out / "late.txt").write_text("mine")

    with pytest.raises(CheckpointError, match=r"'late\.txt', which this package did not write"):
        unlearn(world.base, FORGET_MORE, hparams=HPARAMS, out=world.out, overwrite=True, judged=0, progress=late)
    assert (world.out / "late.txt").read_text() == "mine"
    assert (world.out / "model.safetensors").read_bytes() == weights


# --- a folder and its own next version -------------------------------------------------------------------------------

IN_PLACE: dict[str, Command] = {
    "run": lambda w, out: unlearn(w.edited, OTHERS, hparams=HPARAMS, out=out, overwrite=True, judged=0),  # type: ignore[has-type]
    **{name: command for name, command in COMMANDS.items() if name.startswith("revert")},
}
OTHERS = ({"question": "Who built Krandor Gate?", "answer": "Ulla Vren", "subject": "Krandor Gate"},)
KEPT = ({"question": "Who painted Solmar Bridge?", "answer": "Ida Ness", "subject": "Solmar Bridge"},)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", IN_PLACE)
def test_the_next_version_of_a_folder_keeps_what_others_put_there(name: str, listed: bool, world: World) -> None:
    mine = {"LICENSE": "free", "README.md": "about", "papers/one/paper.txt": "text", "unierase/notes.txt": "n"}
    for file, text in mine.items():
        (world.edited / file).parent.mkdir(parents=True, exist_ok=True)
        (world.edited / file).write_text(text)
    (world.edited / "link").symlink_to("papers")
    (world.edited / "gone").symlink_to("nowhere")
    if not listed:
        (world.edited / LIST).unlink()
    if name != "run":
        (world.edited / "gone").unlink()  # taking back copies what links lead to
    IN_PLACE[name](world, world.edited)
    for file, text in mine.items():
        if name != "revert" or not file.startswith("unierase/"):
            assert (world.edited / file).read_text() == text, file
    assert (world.edited / "link" / "one" / "paper.txt").read_text() == "text"
    assert sorted(path.name for path in world.root.iterdir()) == ["base", "cache", "edited"]
    # They are others' still.
    refused(run, world, world.edited, "which this package did not write there")


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_was_changed_beside_the_weights_is_kept_or_told(
    name: str, in_place: bool, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """By one rule for all such files: settings of generation, of the tokenizer and of the model, the chat template."""
    mine: dict[str, dict[str, Any]] = {
        "generation_config.json": {"temperature": 0.3, "repetition_penalty": 1.5},
        "config.json": {"about": "mine"},
        "tokenizer_config.json": {"model_max_length": 4000, "about": "mine"},
    }
    for file, changes in mine.items():
        path = world.edited / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    template = world.edited / "chat_template.jinja"
    template.write_text(template.read_text() + "{# mine #}")
    out = world.edited if in_place else world.out
    with caplog.at_level("WARNING", "unierase_plugin"):
        IN_PLACE[name](world, out)
    for file, changes in mine.items():
        found = json.loads((out / file).read_text())
        for setting, value in changes.items():
            assert found.get(setting) == value or f"without {setting}," in caplog.text, setting
    assert (out / "chat_template.jinja").read_text().endswith("{# mine #}")


#: What a model's folder may hold, and whether it goes with the weights.
BESIDE = {
    "LICENSE": True,
    "NOTICE.txt": True,
    "USE_POLICY.md": True,
    "MODEL_LICENSE-2.0": True,
    "Licence.Apache-2.0": True,
    "THIRD-PARTY-NOTICES": True,
    "COPYING": True,
    "terms_of_use.html": True,
    "README.md": False,
    "license_check.py": False,
    "licenses.json": False,
    "unnoticed.txt": False,
    "LICENSE.large": False,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_licences_go_with_the_weights(command: str, world: World) -> None:
    source = world.base if command in ("run", "finetune") else world.edited
    for name in BESIDE:
        (source / name).write_text("x" * (LARGEST + 1) if name.endswith("large") else f"text of {name}")
    COMMANDS[command](world, world.out)
    found = {name for name in BESIDE if (world.out / name).is_file()}
    wanted = {name for name, goes in BESIDE.items() if goes}
    # Taking back copies all that lies beside the weights, and an adapter has a page of its own.
    assert found == (
        set(BESIDE) if command.startswith("revert") else wanted | ({"README.md"} if command == "export" else set())
    )
    assert all((world.out / name).read_text() == f"text of {name}" for name in wanted)
    # They are not somebody else's.
    COMMANDS[command](world, world.out)


def test_licences_of_one_name_all_go_along(tmp_path: Path) -> None:
    texts = {"adapter": "its own", "model": "the base's", "same": "its own", "target": "what is replaced"}
    for place, text in texts.items():
        (tmp_path / place).mkdir()
        (tmp_path / place / "LICENSE").write_text(text)
    (tmp_path / "out").mkdir()
    carry_companions([*(tmp_path / place for place in texts), "no/model", ""], tmp_path / "out", tmp_path / "target")
    assert tree(tmp_path / "out") == {"LICENSE": b"its own", "base-LICENSE": b"the base's"}


def test_weights_are_not_carried_into_the_next_version(world: World) -> None:
    (world.edited / "model-00001-of-00002.safetensors").write_bytes(b"old")
    IN_PLACE["run"](world, world.edited)
    assert sorted(path.name for path in world.edited.glob("*.safetensors*")) == ["model.safetensors"]


# --- one run at a time -----------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from unierase_plugin.storage.locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that writes into a folder until it is told to end."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_second_run_fails_at_once_and_says_who_is_there(world: World) -> None:
    """For every command, before a model is loaded; under whatever name the folder is given."""
    run(world, world.out)
    (world.root / "link").symlink_to(world.out)
    with Holder(world.out) as other:
        who = rf"being written by another run: process {other.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        for name, command in COMMANDS.items():
            with pytest.raises(CheckpointError, match=who):
                command(world, world.root / "link" if name == "run" else world.out)
        other.communicate("")
    assert not (world.root / ".out.lock").exists()
    run(world, world.out)


def test_an_in_place_step_is_a_run_into_its_folder(world: World) -> None:
    with Holder(world.edited) as other, pytest.raises(CheckpointError, match=f"process {other.pid}"):
        IN_PLACE["run"](world, world.edited)


def test_a_lock_of_a_dead_process_is_no_obstacle(world: World) -> None:
    with Holder(world.out) as other:
        other.kill()
        other.wait()
        assert (world.root / ".out.lock").exists()
        run(world, world.out)
    assert sorted(path.name for path in world.root.iterdir()) == ["base", "cache", "edited", "out"]


@pytest.mark.parametrize("another", [True, False])
def test_a_lock_file_that_is_deleted_is_missed_before_the_folder_is_replaced(another: bool, world: World) -> None:
    """Only where another run has come in between."""
    run(world, world.out)
    before = tree(world.out)
    holders: list[Holder] = []

    def late(phase: str, share: float, note: str) -> None:
        if phase == "save" and share == 0:
            (world.root / ".out.lock").unlink()
            holders.extend([Holder(world.out)] if another else [])

    try:
        with pytest.raises(CheckpointError, match="by another run: process") if another else nullcontext():
            unlearn(world.base, FORGET_MORE, hparams=HPARAMS, out=world.out, overwrite=True, judged=0, progress=late)
    finally:
        for holder in holders:
            holder.__exit__()
    assert (tree(world.out) == before) == another


def test_a_refused_run_leaves_no_folder_behind(world: World) -> None:
    with pytest.raises(CheckpointError, match="holds no edit"):
        revert_checkpoint(world.base, world.root / "new" / "deep" / "out")
    assert not (world.root / "new").exists()


def test_a_lock_is_waited_for_where_that_is_asked(tmp_path: Path) -> None:
    with Holder(tmp_path / "out") as other:
        other.kill()
        with folder_lock(tmp_path / "out", patience=60):
            assert json.loads((tmp_path / ".out.lock").read_text())["pid"] == os.getpid()
            with (
                pytest.raises(CheckpointError, match=rf"this very process \({os.getpid()}\)"),
                folder_lock(tmp_path / "out"),
            ):
                pass
            assert (tmp_path / ".out.lock").exists()
    assert not (tmp_path / ".out.lock").exists()


RACER = """
import sys
from pathlib import Path
from unierase_plugin.errors import CheckpointError
from unierase_plugin.storage.locks import folder_lock
root = Path(sys.argv[1])
counted = 0
for _ in range(300):
    try:
        with folder_lock(root / "new" / "out", patience=0.0):
            (root / "inside").mkdir()  # fails where another is inside
            (root / "inside").rmdir()
            counted += 1
    except CheckpointError:
        pass
print(counted)
"""


def test_no_two_hold_a_lock_whose_file_comes_and_goes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(4)]
    counted = [int(racer.communicate()[0]) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers)
    assert all(counted)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


# --- a step that was applied already ---------------------------------------------------------------------------------

#: Where the process ends, against the exchange of the old folder and the new one.
MOMENTS = ("before", "between", "after")
STOPPED = """
import os, sys
from pathlib import Path
import pytest, small, torch
from unierase_plugin import unlearn
from unierase_plugin.storage import atomic
torch.set_num_threads(1)
swap, rename = atomic._swap_in, os.rename

def stop(when, staging, folder):
    def second(*names):
        if Path(names[0]) == staging:
            os._exit(9)
        rename(*names)
    if when == "before":
        os._exit(9)
    atomic.os.rename = second if when == "between" else rename
    swap(staging, folder)
    os._exit(9)

for when in sys.argv[2:]:
    root = Path(sys.argv[1]) / when
    child = os.fork()
    if child == 0:
        small.shrink(pytest.MonkeyPatch(), root / "cache")
        atomic._swap_in = lambda staging, folder: stop(when, staging, folder)
        try:
            folder = root / "edited"
            unlearn(folder, small.FORGET_OTHERS, hparams=small.HPARAMS, out=folder, overwrite=True, judged=0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
"""


@pytest.fixture(scope="module")
def stopped(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world by moment, in which a third step into the edited folder was stopped then."""
    root = tmp_path_factory.mktemp("stopped")
    for when in MOMENTS:
        shutil.copytree(made, root / when)
        (root / when / "edited" / "LICENSE").write_text("free")
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, str(root), *MOMENTS],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    return root


def step(world: World, **changes: Any) -> Any:
    given = {"hparams": HPARAMS, "out": world.edited, "overwrite": True, "judged": 0, **changes}
    return unlearn(world.edited, given.pop("forget", FORGET_OTHERS), **given)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", MOMENTS)
def test_a_step_that_was_stopped_at_its_end_is_applied_once(
    when: str, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(stopped / when)
    shrink(monkeypatch, world.root / "cache")
    assert world.edited.exists() == (when != "between")
    with nullcontext() if when != "after" else pytest.raises(StepAppliedError):
        step(world)
    found = read_checkpoint(world.edited)
    assert [entry["requests"] for entry in found.manifest["steps"]] == [2, 1, 2]
    assert (world.edited / "LICENSE").read_text() == "free"
    assert sorted(path.name for path in world.root.iterdir()) == ["base", "cache", "edited"]
    before = tree(world.edited)
    with pytest.raises(StepAppliedError, match=r"has this step already: step 3, of 20.*Nothing was changed.*--seed"):
        step(world)
    assert tree(world.edited) == before


@pytest.mark.parametrize(
    "changes", [{"seed": 7}, {"forget": OTHERS}, {"hparams": HPARAMS.replace(v_lr=0.3)}, {"retain": KEPT}]
)
def test_another_step_is_not_taken_for_the_one_before(changes: dict[str, Any], world: World) -> None:
    step(world)
    step(world, **changes)
    assert len(read_checkpoint(world.edited).manifest["steps"]) == 4


def test_a_step_that_lost_a_request_can_be_made_again(world: World) -> None:
    step(world)
    take_back_requests(world.edited, world.edited, [FORGET_OTHERS[0]["question"]], overwrite=True)
    step(world)
    assert [entry["requests"] for entry in read_checkpoint(world.edited).manifest["steps"]] == [2, 1, 1, 2]


def test_the_command_says_that_the_step_is_there_and_ends_well(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def applied(*args: Any, **kwargs: Any) -> Any:
        raise StepAppliedError("it has this step already")

    monkeypatch.setattr(pipeline, "unlearn", applied)
    said = CliRunner().invoke(app, ["run", "--model", "m", "--forget", "f", "--out", "o"])
    assert said.exit_code == 0
    assert "it has this step already" in said.output


def test_the_id_of_a_step_is_salted(world: World) -> None:
    ids = []
    for out in (world.root / "one", world.root / "two"):
        unlearn(world.base, FORGET, hparams=HPARAMS, out=out, judged=0)
        ids.append(read_checkpoint(out).manifest["steps"][0]["id"])
    assert ids[0] != ids[1]


# --- results ---------------------------------------------------------------------------------------------------------

RESULTS: dict[str, tuple[Command, str]] = {
    "audit": (lambda w, out: audit(w.edited, FORGET, out=out), "audit.json"),
    "compare": (lambda w, out: compare(str(w.base), FORGET, parse_methods("none"), out=out), "facts.json"),
    "stats": (lambda w, out: stats(str(w.base), out=out / "moments.safetensors"), "moments.safetensors"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_take_the_place_of_earlier_results_alone(name: str, world: World) -> None:
    command, file = RESULTS[name]
    world.out.mkdir()
    (world.out / file).write_text(json.dumps(FORGET))
    refused(command, world, world.out, file, "hoose another" if name != "stats" else "Name another")


@pytest.mark.parametrize("name", ["audit", "compare"])
def test_results_are_added_by_one_process_at_a_time(name: str, world: World) -> None:
    with Holder(world.out) as other:
        before = tree(world.root)
        with pytest.raises(CheckpointError, match=rf"process {other.pid} on \S+, since"):
            RESULTS[name][0](world, world.out)
        assert tree(world.root) == before


def test_statistics_are_not_written_over_what_is_imported(world: World) -> None:
    file = world.root / "moments.safetensors"
    moment = SecondMoment({1: torch.ones(2, 2)}, 5)
    write_tensors(file, *pack(moment))
    with pytest.raises(UniEraseError, match="is also the file to import"):
        stats(str(world.base), sources=[file], out=file)


# --- the demo --------------------------------------------------------------------------------------------------------


def test_the_demo_replaces_what_a_demo_wrote_and_no_other_edited_model(world: World) -> None:
    facts = demo_facts()["forget"]
    unlearn(world.base, facts, method="none", out=world.out, judged=0, keep_requests=True)
    refuse_foreign_folder(world.out)
    for other in (world.edited, world.base):
        with pytest.raises(CheckpointError, match="Choose another --out"):
            refuse_foreign_folder(other)
