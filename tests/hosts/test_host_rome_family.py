"""ROME's family: its calls in their order. The real evaluate.py of MEMIT and AlphaEdit run in test_host_scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import hosts_data
import pytest
import torch
from small import SHORT, shrink
from tiny import tiny_model, tiny_tokenizer

import unierase_plugin
from unierase_plugin import UniEraseHyperParams, apply_unierase_to_model
from unierase_plugin.errors import UniEraseError
from unierase_plugin.hosts.in_place import HISTORY

RECORDS = hosts_data.counterfact()
REQUESTS = [{"case_id": record["case_id"], **record["requested_rewrite"]} for record in RECORDS]
HPARAMS = UniEraseHyperParams(**SHORT)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, Any]:
    shrink(monkeypatch, tmp_path / "cache")
    return tiny_model("gpt2"), tiny_tokenizer(chat=False)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: Any, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def write_back(model: Any, originals: dict[str, torch.Tensor]) -> None:
    """As MEMIT's evaluate.py does after each chunk."""
    with torch.no_grad():
        for name, value in originals.items():
            next(p for n, p in model.named_parameters() if n == name)[...] = value.to("cpu")


def test_memits_loop_edits_evaluates_and_restores(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    before, words = weights(model), tokenizer.get_vocab()
    for request in REQUESTS:
        edited, originals = apply_unierase_to_model(
            model,
            tokenizer,
            [request],
            HPARAMS,
            copy=False,
            return_orig_weights=True,
            return_orig_weights_device="cpu",
        )
        assert edited is model
        assert not same(model, before)
        write_back(model, originals)
        assert same(model, before)
        assert tokenizer.get_vocab() == words


def test_alphaedits_loop_edits_one_after_the_other(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    for request in REQUESTS:
        edited, originals = apply_unierase_to_model(model, tokenizer, [request], HPARAMS, return_orig_weights=False)
        assert (edited, originals) == (model, {})
    earlier = getattr(model, HISTORY).history
    assert [edit.keys[SHORT["layers"][0]].shape[1] for edit in earlier.edits] == [1, 1]


def test_later_steps_are_those_of_a_run_of_ours(pair: tuple[Any, Any]) -> None:
    from unierase_plugin.facts.request import ForgetRequest
    from unierase_plugin.pipeline import change

    model, tokenizer = pair
    twin, words = tiny_model("gpt2"), tiny_tokenizer(chat=False)
    earlier = None
    for request in REQUESTS:
        apply_unierase_to_model(model, tokenizer, [request], HPARAMS, cache_template="never/{}_{}_{}.npz")
        fact = ForgetRequest(
            request["prompt"].format(request["subject"]), request["target_true"]["str"], request["subject"]
        )
        _, earlier = change(twin, [fact], tokenizer=words, hparams=HPARAMS, history=earlier)
    assert same(model, weights(twin))


def test_two_models_of_a_process_share_nothing(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    apply_unierase_to_model(model, tokenizer, REQUESTS, HPARAMS)
    other = tiny_model("gpt2")
    apply_unierase_to_model(other, tiny_tokenizer(chat=False), REQUESTS, HPARAMS)
    assert same(model, weights(other))
    assert len(getattr(other, HISTORY).steps) == 1


def test_a_bad_request_names_its_case_and_changes_nothing(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    before = weights(model)
    with pytest.raises(UniEraseError, match=r"'prompt' of request 7 must be one text, not None"):
        apply_unierase_to_model(model, tokenizer, [REQUESTS[0], {"case_id": 7, "subject": "x"}], HPARAMS)
    assert same(model, before)
    assert "<unlearn_0>" not in tokenizer.get_vocab()


def test_settings_are_read_from_json_as_the_harness_does(tmp_path: Path) -> None:
    path = tmp_path / "gpt2-xl.json"
    path.write_text('{"layers": [1, 2], "v_lr": 5e-1, "prompt_forms": ["bare"]}')
    read = UniEraseHyperParams.from_json(path)
    assert (read.layers, read.v_lr, read.prompt_forms) == ((1, 2), 0.5, ("bare",))


def test_the_function_is_found_at_the_top_and_waits_for_torch() -> None:
    assert "apply_unierase_to_model" in unierase_plugin.__all__
    code = "import sys, unierase_plugin; assert 'torch' not in sys.modules; unierase_plugin.apply_unierase_to_model"
    subprocess.run([sys.executable, "-c", code], check=True)
