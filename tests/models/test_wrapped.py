"""Models with something before their weights, adapters, and folders that are not what was to be written."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import FORGET, HPARAMS, save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import export_adapter, revert_checkpoint
from unierase_plugin.checkpoint.readback import check_written
from unierase_plugin.cli import app
from unierase_plugin.errors import ArchitectureError, CheckpointError, DependencyError, UniEraseError
from unierase_plugin.finetune import finetune
from unierase_plugin.hosts.easyedit import EasyEditHyperParams, _load
from unierase_plugin.hosts.in_place import edit_in_place
from unierase_plugin.models.architecture import refuse_unfit
from unierase_plugin.models.loading import load

IDS = torch.tensor([[5, 60, 70, 8, 9, 100]])
DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, tmp_path / "cache")


def with_lora(model: Any, **settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'unierase-plugin[peft]'")
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def changed_at(name: str, change: Callable[[nn.Module], Any]) -> Callable[[], Any]:
    def make() -> Any:
        model = tiny_model()
        change(model.get_submodule(name))
        return model

    return make


def attached() -> Any:
    model = tiny_model()
    with_lora(model)
    return model


def compiled_inside() -> Any:
    model = tiny_model()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def compiled_in_place() -> Any:
    model = tiny_model()
    model.compile(backend="eager")
    return model


#: How a model is made, what the message says, and how its remedy is followed.
WRAPPED: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Any] | None]] = {
    "adapter": (lambda: with_lora(tiny_model()), "merge_and_unload", lambda model: model.merge_and_unload()),
    "adapter inside": (attached, "merge_and_unload", None),
    "compiled": (
        lambda: torch.compile(tiny_model(), backend="eager"),
        r"model\._orig_mod",
        lambda model: model._orig_mod,
    ),
    "compiled in place": (compiled_in_place, r"without compile\(\)", None),
    "a compiled block": (compiled_inside, r"'model\.layers\.1' is compiled", None),
    "data parallel": (lambda: nn.DataParallel(tiny_model()), r"model\.module", lambda model: model.module),
    "parametrised": (
        changed_at(DOWN, parametrizations.weight_norm),
        f"'{DOWN}' computes its weight .*remove_parametrizations",
        lambda model: parametrize.remove_parametrizations(model.get_submodule(DOWN), "weight") and model,
    ),
    "parametrised elsewhere": (changed_at(UP, parametrizations.orthogonal), f"'{UP}' computes its weight", None),
    "pruned": (
        changed_at(DOWN, lambda module: prune.random_unstructured(module, "weight", 0.1)),
        f"weight of '{DOWN}' is computed",
        lambda model: prune.remove(model.get_submodule(DOWN), "weight") and model,
    ),
    "pruned elsewhere": (
        changed_at(UP, lambda module: prune.random_unstructured(module, "weight", 0.1)),
        f"weight of '{UP}' is computed",
        None,
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_is_refused_with_its_remedy(kind: str, tmp_path: Path) -> None:
    make, says, remedy = WRAPPED[kind]
    model, tokenizer = make(), tiny_tokenizer()
    settings: Any = EasyEditHyperParams()
    settings.model_name = (model, tokenizer)
    doors: list[Callable[[], Any]] = [
        lambda: unlearn(model, FORGET, tokenizer=tokenizer, hparams=HPARAMS, out=tmp_path / "out"),
        lambda: edit_in_place(model, tokenizer, (), HPARAMS),
        lambda: _load(settings),
    ]
    for door in doors:
        with pytest.raises(ArchitectureError, match=says):
            door()
    assert not (tmp_path / "out").exists()
    assert "unierase_history" not in vars(model)
    if remedy is not None:
        refuse_unfit(remedy(model))


# --- adapters --------------------------------------------------------------------------------------------------------


def adapter(root: Path, **settings: Any) -> Path:
    """The folder of an adapter for `root/base`."""
    save_base(root / "base")
    with_lora(AutoModelForCausalLM.from_pretrained(root / "base"), **settings).save_pretrained(root / "adapter")
    return root / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits[..., :260]  # type: ignore[no-any-return]


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"], "target_modules": ["up_proj"]}])
def test_an_adapter_is_merged_into_its_base(settings: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    folder = adapter(tmp_path, **settings)
    wanted = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    model, tokenizer = load(folder)
    assert len(tokenizer) == 260  # the base's, since the adapter has none
    torch.testing.assert_close(logits(model), logits(wanted), rtol=0, atol=1e-4)
    assert "is merged into its base model" in caplog.text
    unlearn(folder, FORGET, hparams=HPARAMS, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    torch.testing.assert_close(logits(load(tmp_path / "back")[0]), logits(model), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="merged into"):
        export_adapter(tmp_path / "out", tmp_path / "exported")


@pytest.mark.parametrize("command", ["run", "stats", "finetune"])
def test_an_adapter_beside_whole_weights_is_refused(command: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    save_base(folder)
    (tmp_path / "facts.json").write_text(json.dumps(FORGET))
    facts = {"run": ["--forget"], "finetune": ["--facts"], "stats": []}[command]
    rest = [*facts, str(tmp_path / "facts.json"), "--out", str(tmp_path / "out")] if facts else []
    found = CliRunner().invoke(app, [command, "--model", str(folder), *rest])
    assert found.exit_code == 1
    assert "holds whole weights (model.safetensors) and an adapter beside them" in " ".join(found.output.split())


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(sorted(weights.items())[1:]), folder / "adapter_model.safetensors")


def with_another(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(8, 32)
    save_file(weights, folder / "adapter_model.safetensors")


def of_no_base(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(folder / "gone")}))


@pytest.mark.parametrize(
    ("settings", "damage", "says"),
    [
        ({}, without_a_weight, "does not fit its base model: it lacks"),
        ({}, with_another, r"does not fit its base model: it holds .*layers\.9"),
        ({}, of_no_base, "The base model .*gone.* of the adapter .* is not available"),
        ({"target_modules": ["embed_tokens"]}, lambda folder: None, "changes what the model says"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    settings: Any, damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    folder = adapter(tmp_path, **settings)
    damage(folder)
    with pytest.raises(UniEraseError, match=says):
        load(folder)


def test_an_adapter_without_weights_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(base, prompt).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArchitectureError, match=r"not change weights \(PROMPT_TUNING\)"):
        load(tmp_path / "adapter")


def test_an_adapter_needs_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match=r"unierase-plugin\[peft\]"):
        load(folder)


# --- what was written ------------------------------------------------------------------------------------------------


def rewritten(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return damage


def reconfigured(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


WEIGHT = f"{DOWN}.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (rewritten(lambda weights: weights.pop(WEIGHT)), f"{WEIGHT} is not in it"),
    "shape": (rewritten(lambda weights: weights.update({WEIGHT: torch.zeros(32, 63)})), r"is \[32, 63\], not \[32, 64"),
    "dtype": (rewritten(lambda weights: weights.update({WEIGHT: weights[WEIGHT].half()})), "is torch.float16, not"),
    "prefix": (
        rewritten(lambda weights: weights.update({f"_orig_mod.{name}": weights.pop(name) for name in [*weights]})),
        "is not in it",
    ),
    "another": (rewritten(lambda weights: weights.update({"extra": torch.zeros(2)})), "extra in it is no weight"),
    "config": (reconfigured(tie_word_embeddings=False), "config says that the head is not the embedding"),
    "size": (reconfigured(vocab_size=300), r"embed_tokens\.weight is \[26., 32\], not \[300, 32\]"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),  # type: ignore[dict-item]
    "none": (lambda folder: (folder / "model.safetensors").unlink(), "is not in it"),
    "cut": (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot be opened"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_was_not_written_as_it_is_is_seen(what: str, tmp_path: Path) -> None:
    damage, says = DAMAGES[what]
    model = tiny_model()
    folder = save_base(tmp_path / "out", model)
    check_written(folder, model)  # control
    damage(folder)
    with pytest.raises(CheckpointError, match=says):
        check_written(folder, model)


@pytest.mark.parametrize("command", ["run", "revert", "finetune"])
def test_no_command_reports_success_for_it(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base")
    unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "edited")
    # What is there already may be replaced: an earlier output.
    unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "out")
    old = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    kind = type(tiny_model())
    save = copy.copy(kind.save_pretrained)

    def save_less(self: Any, folder: Any, **kwargs: Any) -> None:
        save(self, folder, **kwargs)
        DAMAGES["missing"][0](Path(folder))

    monkeypatch.setattr(kind, "save_pretrained", save_less)
    with pytest.raises(CheckpointError, match=r"not kept: .* is not in it"):
        {
            "run": lambda: unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "out", overwrite=True),
            "revert": lambda: revert_checkpoint(tmp_path / "edited", tmp_path / "out", overwrite=True),
            "finetune": lambda: finetune(
                base, FORGET, tmp_path / "out", options={"epochs": 1}, asked=0, overwrite=True
            ),
        }[command]()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == old


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "opt", "phi3", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_is_read_back(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tied, dtype=torch.bfloat16)
    check_written(save_base(tmp_path / "out", model), model)
