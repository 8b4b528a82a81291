"""A model whose config says something else of its head than its weights do: the weights are right, everywhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import attach
from small import FORGET, FORGET_MORE, HPARAMS, RETAIN, save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import export_adapter, read_checkpoint, revert_checkpoint
from unierase_plugin.finetune import finetune
from unierase_plugin.hosts.in_place import edit_in_place
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.models.loading import load
from unierase_plugin.models.tying import is_tied, resize_vocabulary
from unierase_plugin.models.weight_files import stored_weights

IDS = torch.tensor([[5, 60, 70, 8, 9, 100]])


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, tmp_path / "cache")


def say_tied(folder: Path, tied: bool) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": tied}))
    return folder


def own_head(folder: Path, family: str = "llama", rows: int = 260) -> Path:
    """A checkpoint with a head of its own, under a config that says tied."""
    return say_tied(save_base(folder, tiny_model(family, tied=False, vocabulary=rows)), True)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: stored.read() for name, stored in stored_weights(folder).items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def in_memory(how: str) -> Any:
    """A model whose config is wrong."""
    model = tiny_model(tied=how != "one of its own")
    if how == "one of its own":
        model.config.tie_word_embeddings = True
        return model
    model.config.tie_word_embeddings = False
    if how == "one storage":
        model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.data)
    return model


@pytest.mark.parametrize(("family", "rows"), [("llama", 260), ("llama", 275), ("gpt2", 260)])
def test_a_head_of_its_own_lives_through_a_run_and_its_way_back(
    family: str, rows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = own_head(tmp_path / "base", family, rows)
    before = weights(base)
    with caplog.at_level(logging.WARNING):
        result = unlearn(base, FORGET, retain=RETAIN, hparams=HPARAMS, out=tmp_path / "out")
    assert "has a head of its own" in caplog.text
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for model in (result.model, edited):
        head = model.get_output_embeddings().weight
        assert not is_tied(model)
        assert model.config.tie_word_embeddings is False
        assert torch.equal(head[:260], before["lm_head.weight"][:260])
        assert torch.equal(head[260], result.token.output_row)  # type: ignore[union-attr, arg-type]
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert read_checkpoint(tmp_path / "out").manifest["tied"] is False
    # A second step, and the way back from both, and in memory.
    unlearn(tmp_path / "out", FORGET_MORE, hparams=HPARAMS, out=tmp_path / "two")
    revert_checkpoint(tmp_path / "two", tmp_path / "back")
    assert same(weights(tmp_path / "back"), before)
    result.revert()
    assert torch.equal(result.model.get_output_embeddings().weight, before["lm_head.weight"])


def test_the_corrected_config_finds_the_same_token(tmp_path: Path) -> None:
    base = own_head(tmp_path / "base")
    first = unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "first")
    second = unlearn(say_tied(base, False), FORGET, hparams=HPARAMS, out=tmp_path / "second")
    tied = unlearn(save_base(tmp_path / "tied"), FORGET, hparams=HPARAMS)
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    assert [result.token.output_row is None for result in (first, second, tied)] == [False, False, True]  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["rome", "npo_gd"])
def test_every_method_writes_what_the_weights_are(method: str, tmp_path: Path) -> None:
    base = own_head(tmp_path / "base")
    unlearn(base, FORGET, retain=RETAIN, method=method, out=tmp_path / "out", judged=0, hparams=quick(method))
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in weights(tmp_path / "out")


def quick(method: str) -> Any:
    from unierase_plugin.plugins.registration import registry

    kind = registry().methods.find(method).hparams
    few = {
        "epochs": 1,
        "layers": (1,),
        "v_num_grad_steps": 2,
        "mom2_n_samples": 4,
        "mom2_max_length": 24,
        "context_template_length_params": ((3, 1),),
        "retain_neighbours": 0,
        "removal_passes": 1,
    }
    return kind().replace(**{name: value for name, value in few.items() if name in kind().as_dict()})


def test_a_trained_model_keeps_its_head(tmp_path: Path) -> None:
    base = own_head(tmp_path / "base")
    finetune(base, FORGET, tmp_path / "out", options={"epochs": 1}, asked=0)
    model, _ = load(tmp_path / "out")
    assert not is_tied(model)
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("how", ["one of its own", "the embedding", "one storage"])
def test_a_loaded_model_keeps_what_it_has(how: str, tmp_path: Path) -> None:
    model, tokenizer = in_memory(how), tiny_tokenizer()
    tied, said = how != "one of its own", model.config.tie_word_embeddings
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert find_architecture(model).tied is tied
    result = unlearn(model, FORGET, tokenizer=tokenizer, hparams=HPARAMS, out=tmp_path / "out")
    assert (result.token.output_row is None) is tied  # type: ignore[union-attr]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert is_tied(opened) is opened.config.tie_word_embeddings is tied
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, model(IDS).logits)
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert all(torch.equal(weight, before[name]) for name, weight in weights(tmp_path / "back").items())
    result.revert()
    assert is_tied(model) is tied
    assert model.config.tie_word_embeddings is said
    assert same(model.state_dict(), before)


def test_an_edit_in_a_harness_keeps_the_head() -> None:
    model, tokenizer = in_memory("one of its own"), tiny_tokenizer()
    before = model.get_output_embeddings().weight.detach().clone()
    _, originals = edit_in_place(model, tokenizer, facts(), HPARAMS)
    assert not is_tied(model)
    assert torch.equal(model.get_output_embeddings().weight[:260], before)
    originals.restore()
    assert torch.equal(model.get_output_embeddings().weight, before)


def facts() -> Any:
    from unierase_plugin.facts.readers import read_requests

    return read_requests(FORGET, {})


def test_an_adapter_fits_a_head_of_its_own(tmp_path: Path) -> None:
    """By the lines of its README, which open the base anew."""
    pytest.importorskip("peft")
    own_head(tmp_path / "base")
    unlearn(tmp_path / "base", FORGET, hparams=HPARAMS, out=tmp_path / "out")
    _, model = attach(tmp_path, export_adapter(tmp_path / "out", tmp_path / "adapter"))
    wanted, _ = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("how", "tied"), [("one of its own", False), ("the embedding", True), ("one storage", True)])
@pytest.mark.parametrize("rows", [261, 100])
def test_another_size_leaves_head_and_embedding_as_they_were(how: str, tied: bool, rows: int) -> None:
    model = in_memory(how)
    before = model.get_output_embeddings().weight.detach().clone()
    resize_vocabulary(model, rows)
    kept = min(rows, 260)
    assert is_tied(model) is tied
    assert model.get_input_embeddings().weight.shape == (rows, 32)
    assert torch.equal(model.get_output_embeddings().weight[:kept], before[:kept])


def test_weights_that_the_model_does_not_have_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_base(tmp_path / "base", tiny_model(blocks=5))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4, "layer_types": None}))
    with caplog.at_level(logging.WARNING):
        load(base)
    assert "holds 9 weights that the model of its config does not have, such as model.layers.4" in caplog.text
