"""What earlier releases of transformers look for in a folder, and what this one still reads there."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from unierase_plugin.checkpoint.older_transformers import write_for_older_transformers
from unierase_plugin.storage.fingerprints import model_fingerprint, tokenizer_fingerprint

FLAT = {"rope_theta": 12345.0, "rope_type": "linear", "factor": 2.0}
PARTIAL = {"rope_theta": 50.0, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
NESTED = {
    "full_attention": {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0},
    "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
}
SCALED = {"rope_type": "linear", "factor": 2.0}
#: By family: what it holds of rotary embeddings, other than its default, and how earlier releases call it.
ROTARY = {
    "llama": (FLAT, {"rope_theta": 12345.0, "rope_scaling": SCALED}),
    "gpt_neox": (PARTIAL, {"rotary_emb_base": 50.0, "rotary_pct": 0.5, "rope_scaling": SCALED}),
    "gemma3_text": (
        NESTED,
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {**SCALED, "factor": 8.0}},
    ),
    "gpt2": (None, {}),
}


@pytest.fixture(params=ROTARY)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    rotary: Any = ROTARY[family][0]
    if rotary and "rope_parameters" not in inspect.signature(LlamaConfig.__init__).parameters:
        pytest.skip("this release of transformers is itself an earlier one, without rope_parameters")
    tiny_model(family, **({"rope_parameters": rotary} if rotary else {})).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<unlearn_0>"]})
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def read(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text(encoding="utf-8")))


def test_the_names_that_earlier_releases_look_for_are_there(folder: Path, family: str) -> None:
    write_for_older_transformers(folder)
    config, words = read(folder, "config.json"), read(folder, "tokenizer_config.json")
    wanted = {"torch_dtype": "float32", **ROTARY[family][1]}
    for name, value in wanted.items():
        assert config[name] == (value if not isinstance(value, dict) else {**config[name], **value})
    # Their default has token types too, which generate() refuses or, in GPT-2, adds to the embeddings.
    assert words["model_input_names"] == ["input_ids", "attention_mask"]
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<unlearn_0>" in words["additional_special_tokens"]
    assert words["chat_template"] == tiny_tokenizer().chat_template


def test_this_release_reads_the_same_as_before(folder: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    before = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    write_for_older_transformers(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert torch.equal(model(input_ids=ids).logits, before[0](input_ids=ids).logits)
    assert model_fingerprint(model) == model_fingerprint(before[0])
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(before[1])


@pytest.mark.parametrize(("kind", "names"), [("TokenizersBackend", ["input_ids"]), ("Qwen2Tokenizer", None)])
def test_inputs_that_are_named_or_that_a_class_knows_are_left(
    kind: str, names: list[str] | None, tmp_path: Path
) -> None:
    given = {"tokenizer_class": kind, **({"model_input_names": names} if names else {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given), encoding="utf-8")
    write_for_older_transformers(tmp_path)
    assert read(tmp_path, "tokenizer_config.json").get("model_input_names") == names


def test_a_second_time_changes_nothing_and_an_empty_folder_stays_empty(folder: Path, tmp_path: Path) -> None:
    write_for_older_transformers(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_for_older_transformers(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    empty = tmp_path / "empty"
    empty.mkdir()
    write_for_older_transformers(empty)
    assert not list(empty.iterdir())
