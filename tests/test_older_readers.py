"""What earlier releases of transformers look for in a folder, and what this one still reads there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from unierase_plugin.older_readers import write_for_older_readers
from unierase_plugin.store import model_fingerprint, tokenizer_fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rotary = {"rope_theta": 12345.0, "rope_type": "linear", "factor": 2.0}
    tiny_model(rope_parameters=rotary).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<unlearn_0>"]})
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def read(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text(encoding="utf-8")))


def test_the_names_that_earlier_releases_look_for_are_there(folder: Path) -> None:
    write_for_older_readers(folder)
    config, words = read(folder, "config.json"), read(folder, "tokenizer_config.json")
    assert config["rope_theta"] == 12345.0
    assert (config["rope_scaling"]["factor"], config["rope_scaling"]["rope_type"]) == (2.0, "linear")
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<unlearn_0>" in words["additional_special_tokens"]
    assert words["chat_template"] == tiny_tokenizer().chat_template


def test_this_release_reads_the_same_as_before(folder: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    before = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    write_for_older_readers(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert torch.equal(model(input_ids=ids).logits, before[0](input_ids=ids).logits)
    assert model_fingerprint(model) == model_fingerprint(before[0])
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(before[1])


def test_a_second_time_changes_nothing_and_an_empty_folder_stays_empty(folder: Path, tmp_path: Path) -> None:
    write_for_older_readers(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_for_older_readers(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    empty = tmp_path / "empty"
    empty.mkdir()
    write_for_older_readers(empty)
    assert not list(empty.iterdir())
