"""What a model writes does not depend on its own settings for writing."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import unierase_plugin
from unierase_plugin.locate_then_edit.targets import context_texts
from unierase_plugin.models.generate import answers, generate
from unierase_plugin.models.trace import pad
from unierase_plugin.statistics.corpus import sample_from_model

#: What published models come with, each of which changes or breaks plain greedy writing.
OWN: tuple[dict[str, Any], ...] = (
    {"num_beams": 3},
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 9},
    {"return_dict_in_generate": True},
    {"num_return_sequences": 2, "do_sample": True},
    {"stop_strings": ["a"]},
    {"temperature": 0.1, "top_k": 1, "do_sample": True},
    {"suppress_tokens": [5, 60, 70]},
    {"max_length": 6},
)
PROMPTS = [[5, 60, 70, 8], [9, 100], [33, 34, 35]]


def straight(model: Any, prompt: list[int], room: int) -> list[int]:
    """Greedy, one token after another, by plain forward passes; up to the end, which is token 2."""
    ids = list(prompt)
    while len(ids) < len(prompt) + room:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("own", OWN, ids=lambda own: next(iter(own)))
def test_greedy_text_is_that_of_plain_forward_passes_whatever_the_model_is_set_to(own: dict[str, Any]) -> None:
    model = tiny_model()
    model.generation_config.update(**own)
    settings = model.generation_config
    batch = pad(PROMPTS, 0, "left", torch.device("cpu"))
    found = generate(model, batch.ids, batch.mask, 8, 0).tolist()
    assert model.generation_config is settings
    for prompt, ids in zip(PROMPTS, found, strict=True):
        wanted = straight(model, prompt, 8)
        assert ids == wanted + [0] * (len(ids) - len(wanted))


@pytest.mark.parametrize("own", OWN, ids=lambda own: next(iter(own)))
def test_everything_that_writes_is_deaf_to_them(own: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()

    def written(model: Any) -> tuple[Any, ...]:
        return (
            answers(model, tokenizer, ["Who is Bob?", "Why?"], max_new_tokens=8),
            context_texts(model, tokenizer, ((8, 2),), 0),
            sample_from_model(model, tokenizer, 4, 40, 0, ["Who is Bob?"]),
        )

    plain, other = tiny_model(), tiny_model()
    other.generation_config.update(**own)
    assert written(other) == written(plain)


def test_the_ends_that_the_model_names_still_end_it() -> None:
    model, batch = tiny_model(), pad(PROMPTS[:1], 0, "left", torch.device("cpu"))
    first = straight(model, PROMPTS[0], 8)
    model.generation_config.eos_token_id = [2, first[2]]
    assert generate(model, batch.ids, batch.mask, 8, 0).tolist() == [first[: first.index(first[2]) + 1]]


def test_nothing_else_in_the_package_asks_a_model_to_write() -> None:
    """A call of its own would write by the model's settings again."""
    root = Path(unierase_plugin.__file__).parent
    calls = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "generate"
    ]
    assert calls == ["models/generate.py"]
