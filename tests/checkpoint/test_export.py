"""The edit as a PEFT adapter: attached, detached and merged, it gives what the folders give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import attach
from families import FAMILIES, gemma3
from small import FORGET, FORGET_MORE, HPARAMS, shrink
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import export_adapter, read_checkpoint, revert_checkpoint
from unierase_plugin.errors import CheckpointError

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'unierase-plugin[peft]'")

IDS = torch.tensor([[5, 60, 70, 8, 9, 100]])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def edit(root: Path, model: Any, *, steps: int = 1) -> Path:
    """Saves the base model to `root/base` and edits it into `root/1` and `root/2`, the second step in one block."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, root / "cache")
        source = root / "base"
        model.save_pretrained(source)
        tiny_tokenizer().save_pretrained(source)
        for step, facts in enumerate((FORGET, FORGET_MORE)[:steps], start=1):
            settings = HPARAMS.replace(layers=(1, 2) if step == 1 else (2,))
            unlearn(source, facts, hparams=settings, out=root / str(step))
            source = root / str(step)
    return source


#: The token finds no padding row in the first two; in the others it takes one.
KINDS = {
    "tied, grown": lambda: tiny_model("llama", True),
    "untied, grown": lambda: tiny_model("llama", False),
    "tied, padding": lambda: FAMILIES["smollm2-135m"](),
    "untied, padding": lambda: FAMILIES["llama3-8b"](),
    "gpt2": lambda: FAMILIES["gpt2-xl"](),
    "gpt2, grown": lambda: tiny_model("gpt2", True),
    "gemma3": lambda: gemma3(window=64),  # so that attention above the edit reaches the answer
    "gpt_neox": lambda: FAMILIES["pythia-6.9b"](),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_on_the_base_gives_the_edited_model(kind: str, tmp_path: Path) -> None:
    edited = edit(tmp_path, KINDS[kind]())
    adapter = export_adapter(edited, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == kind.startswith("gpt2")  # PEFT mends it where it is wrong, with a warning
    # Its head is `embed_out` in files and in earlier releases of transformers, `lm_head` in this one.
    renamed = kind == "gpt_neox" and "lm_head" in config["trainable_token_indices"]
    assert ("other names for `lm_head` of this model" in (adapter / "README.md").read_text()) == renamed
    base, model = attach(tmp_path, adapter)
    wanted = load(edited)
    token = read_checkpoint(edited).token
    assert token is not None
    ids = torch.cat([IDS, torch.tensor([[token.id, 7, 8]])], dim=1)
    assert torch.allclose(logits(model, ids), logits(wanted, ids), atol=1e-5, rtol=0)
    with model.disable_adapter():
        rows = base.get_input_embeddings().weight.shape[0]
        assert torch.equal(logits(model)[..., :rows], logits(base))
        assert not torch.allclose(logits(model), logits(wanted), atol=1e-3)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, ids), logits(wanted, ids), atol=1e-5, rtol=0)
    assert type(merged) is type(wanted)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer("a<unlearn_0>", add_special_tokens=False)["input_ids"][-1] == token.id


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps whose ranks differ by block: 2 and 3."""
    root = tmp_path_factory.mktemp("steps")
    edit(root, tiny_model(), steps=2)
    return root


@pytest.mark.parametrize("step", [1, 2])
def test_the_first_steps_alone_can_be_exported(steps: Path, tmp_path: Path, step: int) -> None:
    adapter = export_adapter(steps / "2", tmp_path / "adapter", step=step)
    assert torch.allclose(logits(attach(steps, adapter)[1]), logits(load(steps / str(step))), atol=1e-5, rtol=0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    wanted = {"model.layers.1.mlp.down_proj": 2, "model.layers.2.mlp.down_proj": 2 + (step == 2)}
    assert config["rank_pattern"] == config["alpha_pattern"] == wanted


def test_peft_alone_finds_base_and_tokenizer(steps: Path, tmp_path: Path) -> None:
    adapter = export_adapter(steps / "2", tmp_path / "adapter")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert torch.allclose(logits(model), logits(load(steps / "2")), atol=1e-5, rtol=0)


@pytest.mark.skipif(
    peft.__version__.startswith("0.18."), reason="peft 0.18 cannot put a second adapter's token rows on a tied head"
)
def test_two_edits_of_one_base_can_be_switched(steps: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        export_adapter(steps / "2", tmp_path / str(step), step=step)
    model = attach(steps, tmp_path / "1")[1]
    model.load_adapter(tmp_path / "2", adapter_name="later")
    for name, step in (("later", 2), ("default", 1)):
        model.set_adapter(name)
        assert torch.allclose(logits(model), logits(load(steps / str(step))), atol=1e-5, rtol=0)


def test_every_folder_has_a_tokenizer_that_earlier_releases_read(steps: Path, tmp_path: Path) -> None:
    folders = [steps / "2", export_adapter(steps / "2", tmp_path / "adapter"), tmp_path / "base"]
    revert_checkpoint(steps / "2", tmp_path / "base")
    for folder in folders:
        words = json.loads((folder / "tokenizer_config.json").read_text())
        assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert words["model_input_names"] == ["input_ids", "attention_mask"]
        assert words["chat_template"]


def test_what_cannot_be_an_adapter_says_so(steps: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no step 3 to export.*holds 2.*1 to 2"):
        export_adapter(steps / "2", tmp_path / "out", step=3)
    with pytest.raises(CheckpointError, match=r"no step 0"):
        export_adapter(steps / "2", tmp_path / "out", step=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(CheckpointError, match="--overwrite"):
        export_adapter(steps / "2", tmp_path / "full")
    revert_checkpoint(steps / "2", tmp_path / "base")
    with pytest.raises(CheckpointError, match="holds no edit"):
        export_adapter(tmp_path / "base", tmp_path / "out")
    edited = edit(tmp_path / "gptj", FAMILIES["gpt-j-6b"]())
    with pytest.raises(CheckpointError, match=r"head of GPTJForCausalLM has a bias"):
        export_adapter(edited, tmp_path / "out")
    assert not (tmp_path / "out").exists()
