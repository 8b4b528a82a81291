"""PEFT adapters whose vocabulary grew in training, and adapters that are evaluated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from small import FORGET, HPARAMS, save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import export_adapter, revert_checkpoint
from unierase_plugin.errors import ArchitectureError, DependencyError, UniEraseError
from unierase_plugin.models.loading import load
from unierase_plugin.tasks.lm_eval_cli import run_lm_eval
from unierase_plugin.tasks.task_manager import our_tasks_found, tasks_folder

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'unierase-plugin[peft]'")

ADDED = ("<a>", "<b>")
IDS = torch.tensor([[5, 60, 70, 8, 9, 100, 260, 261]])


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, tmp_path / "cache")


def trained(
    root: Path,
    *,
    tied: bool = True,
    had: int = 260,
    rows: int | None = 264,
    tokenizer: bool = True,
    saved: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Path, Any]:
    """An adapter's folder for `root/base`, whose vocabulary had `rows` rows in training, and the model as trained."""
    save_base(root / "base", tiny_model(tied=tied, vocabulary=had))
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    if rows is not None:
        model.resize_token_embeddings(rows)
    chosen = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    torch.manual_seed(1)
    attached = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for weight in (each for each in attached.parameters() if each.requires_grad):
            weight += 0.05 * torch.randn_like(weight)
    attached.eval().save_pretrained(root / "adapter", **(saved or {}))
    if tokenizer:
        larger = tiny_tokenizer()
        larger.add_tokens(list(ADDED))
        larger.save_pretrained(root / "adapter")
    return root / "adapter", attached


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.clamp(max=model.get_input_embeddings().weight.shape[0] - 1)).logits  # type: ignore[no-any-return]


TOKENS = [260, 261]
#: What PEFT saves of a vocabulary that was resized: both matrices whole, in the files' different names, or rows alone.
GROWN: dict[str, dict[str, Any]] = {
    "saved whole": {},
    "modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one module": {"modules_to_save": ["embed_tokens"]},
    "tied modules": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "tokens alone": {
        "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS},
        "rows": 262,
        "saved": {"save_embedding_layers": False},
    },
    "fewer": {"had": 280, "rows": 262},
    "in padding rows": {"had": 280, "rows": None, "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", GROWN)
def test_a_vocabulary_that_grew_is_merged(kind: str, tied: bool, tmp_path: Path) -> None:
    folder, attached = trained(tmp_path, tied=tied, **GROWN[kind])
    if tied and kind in ("tokens of both", "tokens alone") and Version(peft.__version__) < Version("0.19"):
        # One matrix cannot hold the two rows that such versions train for a token.
        with pytest.raises(ArchitectureError, match="changes what the model says"):
            load(folder)
        return
    model, tokenizer = load(folder)
    wanted = logits(attached)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    assert tokenizer.convert_tokens_to_ids(list(ADDED)) == TOKENS
    # Saved and opened again, as a run writes it, it is the same.
    model.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_a_grown_model_is_edited_and_given_back(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    before = logits(load(folder)[0])
    unlearn(folder, FORGET, hparams=HPARAMS, out=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<unlearn_0>") == 262
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    torch.testing.assert_close(logits(load(tmp_path / "back")[0]), before, rtol=0, atol=0)


def cut_the_head(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = weights["base_model.model.lm_head.weight"][:-1].clone()
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        # The rows of the new tokens are nowhere, or those tokens never had any: the files are the same.
        ({"saved": {"save_embedding_layers": False}}, r"up to number 261, but its base model has 260 rows.*take"),
        ({"rows": None}, r"tokens up to number 261, but its base model has 260 rows.*save_embedding_layers=True"),
        (
            {"tied": False, "trainable_token_indices": TOKENS, "saved": {"save_embedding_layers": False}},
            r"grew from 260 rows to 262, and does not hold all of the new rows.*merge_and_unload",
        ),
        (
            {"trainable_token_indices": [261], "saved": {"save_embedding_layers": False}},
            "grew from 260 rows to 262, and does not hold all",
        ),
        (
            {"modules_to_save": ["embed_tokens"], "saved": {"save_embedding_layers": False}},
            "grew from 260 rows to 264, and does not hold all",
        ),
        ({"tied": False, "target_modules": ["embed_tokens"]}, "grew from 260 rows to 264, and does not hold all"),
        ({"tied": False, "damage": cut_the_head}, r"of different sizes: 263 in .*lm_head.weight, 264 in .*embed_tok"),
    ],
)
def test_rows_that_are_nowhere_are_told(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, **{key: value for key, value in settings.items() if key != "damage"})
    settings.get("damage", lambda folder: None)(folder)
    with pytest.raises(ArchitectureError, match=says):
        load(folder)


def test_a_tokenizer_for_which_there_are_no_rows_may_be_taken_out(tmp_path: Path) -> None:
    folder, attached = trained(tmp_path, rows=None)
    with pytest.raises(ArchitectureError, match="take the tokenizer's files out of the folder"):
        load(folder)
    for path in folder.glob("*token*"):
        path.unlink()
    model, tokenizer = load(folder)
    torch.testing.assert_close(logits(model), logits(attached), rtol=0, atol=1e-4)
    assert len(tokenizer) == 260


# --- evaluated -------------------------------------------------------------------------------------------------------


def opened(folder: Path, kind: str = "unierase_hf") -> Any:
    """What lm-eval opens."""
    pytest.importorskip("lm_eval")
    from unierase_plugin.tasks.lm_eval_model import HFWithSpecialTokens, WholeHF

    return {"unierase_hf": HFWithSpecialTokens, "hf": WholeHF}[kind](pretrained=str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["unierase_hf", "hf"])
@pytest.mark.parametrize("settings", [{"rows": None, "tokenizer": False}, {}, GROWN["modules"], GROWN["tokens"]])
def test_an_adapter_is_evaluated_as_it_is_edited(settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, **settings)
    model, tokenizer = load(folder)
    found = opened(folder, kind)
    torch.testing.assert_close(logits(found.model), logits(model), rtol=0, atol=0)
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not isinstance(found.model, peft.PeftModel)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [260, 280])
def test_an_exported_edit_is_evaluated(rows: int, tied: bool, tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_model(tied=tied, vocabulary=rows))
    unlearn(tmp_path / "base", FORGET, hparams=HPARAMS, out=tmp_path / "out")
    export_adapter(tmp_path / "out", tmp_path / "exported")
    found = opened(tmp_path / "exported")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found.model), logits(wanted), rtol=0, atol=1e-4)
    assert found.tokenizer.convert_tokens_to_ids("<unlearn_0>") == 260


@pytest.mark.parametrize("kind", ["unierase_hf", "hf"])
def test_what_is_evaluated_is_what_was_given(kind: str, tmp_path: Path) -> None:
    """A head of its own stays one, and weights are not drawn, whichever of the two types of models it is."""
    model = tiny_model(tied=False)
    folder = save_base(tmp_path / "base", model)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    torch.testing.assert_close(logits(opened(folder, kind).model), logits(model), rtol=0, atol=1e-5)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UniEraseError, match=r"does not hold model\.layers\.1\.mlp\.down_proj\.weight"):
        opened(folder, kind)


@pytest.mark.parametrize("task", ["unierase_demo_forget", "my_facts"])
def test_unierase_eval_takes_an_adapter(task: str, tmp_path: Path) -> None:
    """With tasks of ours, and with others alone, for which lm-eval's own `hf` is taken."""
    pytest.importorskip("lm_eval")
    folder, _ = trained(tmp_path)
    (tmp_path / "tasks").mkdir()
    template = (tasks_folder() / "_facts_template").as_posix()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        f"include: {template}\ntask: my_facts\ndataset_kwargs: {{facts: demo:retain}}\n", encoding="utf-8"
    )
    out = tmp_path / "results"
    options = ["--limit", "1", "--device", "cpu", "--output_path", str(out), "--include_path", str(tmp_path / "tasks")]
    with our_tasks_found(only=True, look=lambda manager: None):
        run_lm_eval(["--model", str(folder), "--tasks", task, "--gen_kwargs", "max_gen_toks=4", *options])
    results = json.loads(next(out.rglob("results_*.json")).read_text(encoding="utf-8"))
    assert results["n-samples"][task]["effective"] == 1
    assert results["config"]["model"] == ("hf" if task == "my_facts" else "unierase_hf")


def test_what_cannot_be_opened_is_refused_before_tasks_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    folder, _ = trained(tmp_path)
    arguments = ["--model", str(folder), "--tasks", "unierase_demo_forget"]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        with pytest.raises(DependencyError, match=r"unierase-plugin\[peft\]"):
            run_lm_eval(arguments)
    save_base(folder)
    with pytest.raises(ArchitectureError, match=r"holds whole weights \(model.safetensors\) and an adapter beside"):
        run_lm_eval(arguments)
