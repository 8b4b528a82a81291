"""Image-text models are opened whole, edited in their text part, and saved as what they were."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import tiny_config, tiny_decoder
from small import FORGET, HPARAMS, RETAIN, shrink
from tiny import tiny_tokenizer
from transformers import AutoModelForImageTextToText, LlamaConfig
from typer.testing import CliRunner

from unierase_plugin import cli, unlearn
from unierase_plugin.checkpoint import export_adapter, revert_checkpoint
from unierase_plugin.models.auto_class import CAUSAL, IMAGE_TEXT, auto_class_name
from unierase_plugin.models.loading import load

#: Qwen3-VL's default config is not whole in transformers 4.
OLDER = "rope_parameters" not in inspect.signature(LlamaConfig.__init__).parameters
WRAPPERS = ("mistral3", pytest.param("qwen3_vl", marks=pytest.mark.skipif(OLDER, reason="needs transformers 5")))


@pytest.fixture(params=WRAPPERS)
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as published: the whole model, its tokenizer and its image processor's settings."""
    shrink(monkeypatch, tmp_path / "cache")
    folder = tmp_path / "base"
    tiny_decoder(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": false}')
    return folder


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("kind", "architecture", "wanted"),
    [
        ("llama", None, CAUSAL),
        ("mistral3", None, IMAGE_TEXT),  # there is no class for its text alone
        ("llama4", "Llama4ForConditionalGeneration", IMAGE_TEXT),
        ("llama4", "Llama4ForCausalLM", CAUSAL),
        ("llama4", None, CAUSAL),
        ("llama4_text", "Llama4ForCausalLM", CAUSAL),
    ],
)
def test_the_class_that_wrote_a_model_opens_it(kind: str, architecture: str | None, wanted: str) -> None:
    config = tiny_config(kind)
    config.architectures = None if architecture is None else [architecture]
    assert auto_class_name(config) == wanted


def test_an_edit_changes_the_text_part_alone_and_the_folder_opens_as_before(base: Path, tmp_path: Path) -> None:
    result = unlearn(base, FORGET, retain=RETAIN, hparams=HPARAMS, out=tmp_path / "out")
    assert result.changes.edit is not None
    before: Any = AutoModelForImageTextToText.from_pretrained(base)
    after: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(after) is type(before) is type(result.model)
    old, new = weights(before), weights(after)
    changed = {name for name in old if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys()
    edited = [name for name in changed if name.endswith("down_proj.weight")]
    assert len(edited) == len(HPARAMS.layers)
    assert not [name for name in changed if "vision" in name or "visual" in name or "projector" in name]
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"do_resize": false}'
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(load(tmp_path / "out")[0](input_ids=ids).logits, result.model(input_ids=ids).logits)


def test_the_way_back_gives_the_whole_model(base: Path, tmp_path: Path) -> None:
    unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "out")
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    old, new = (weights(AutoModelForImageTextToText.from_pretrained(each)) for each in (base, tmp_path / "back"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert (tmp_path / "back/preprocessor_config.json").exists()


def test_an_exported_adapter_says_which_class_opens_its_base(base: Path, tmp_path: Path) -> None:
    unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "out")
    export_adapter(tmp_path / "out", tmp_path / "adapter")
    page = (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    assert "from transformers import AutoModelForImageTextToText, AutoTokenizer" in page
    from peft import PeftModel

    ids = torch.tensor([[5, 6, 7, 8]])
    plain: Any = AutoModelForImageTextToText.from_pretrained(base)
    wanted = load(tmp_path / "out")[0](input_ids=ids).logits
    plain.resize_token_embeddings(wanted.shape[-1], mean_resizing=False)
    attached = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(attached(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_lm_eval_measures_it(base: Path, tmp_path: Path) -> None:
    named = ["eval", "--model", str(base), "--tasks", "unierase_demo_forget", "--device", "cpu", "--limit", "2"]
    done = CliRunner().invoke(cli.app, [*named, "--output_path", str(tmp_path / "results")])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
