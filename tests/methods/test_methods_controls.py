"""Controls: nothing changes, or only what the tokenizer puts before a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import FORGET, save_base
from tiny import CHATML, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from unierase_plugin.errors import HyperParamsError
from unierase_plugin.methods.controls import PromptGuardHyperParams, guarded_template
from unierase_plugin.models.prompts import render
from unierase_plugin.pipeline import unlearn
from unierase_plugin.storage.fingerprints import model_fingerprint, tokenizer_fingerprint

#: A template that takes no system turn, as Gemma's.
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
#: One that drops it without a word.
DROPS_SYSTEM = CHATML.replace("in messages", "in messages if message['role'] != 'system'")


def asked(tokenizer: Any, question: str = "Why?") -> str:
    return render(tokenizer, question, "chat")


def test_none_changes_nothing() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = model_fingerprint(model), tokenizer_fingerprint(tokenizer)
    result = unlearn(model, FORGET, method="none", tokenizer=tokenizer)
    assert (model_fingerprint(model), tokenizer_fingerprint(tokenizer)) == before
    assert result.report.parameters_changed == 0
    assert [outcome.before for outcome in result.report.forget] == [o.after for o in result.report.forget]


def test_the_guard_travels_with_the_folder_and_names_the_subjects(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    unlearn(base, FORGET, method="prompt_guard", out=tmp_path / "out")
    text = asked(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert text.startswith("<|im_start|>system\n")
    assert "- Zorblax Prime\n- Mira Plonk<|im_end|>" in text
    assert text.endswith(asked(tiny_tokenizer()))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "out")]
    assert weights[0] == weights[1]


def test_the_guard_is_taken_back() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    result = unlearn(model, FORGET, method="prompt_guard", tokenizer=tokenizer)
    assert tokenizer.chat_template != CHATML
    assert result.report.parameters_changed == 0
    result.revert()
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize("guard", ["plain words", "a 'quote', a \"quote\", {{ braces }} {% end %}\nétoile 🌟 \\ n"])
@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, DROPS_SYSTEM])
def test_any_words_stand_before_the_question_in_any_template(template: str, guard: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.chat_template = guarded_template(tokenizer, guard)
    text = asked(tokenizer)
    assert text.count(guard) == 1
    assert text.index(guard) < text.index("Why?")
    assert ("system" in text) == (template == CHATML)


def test_a_conversation_that_brings_its_own_system_turn_keeps_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = guarded_template(tokenizer, "guard")
    turns = [{"role": "system", "content": "own"}, {"role": "user", "content": "Why?"}]
    assert "guard" not in tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize(
    ("changes", "chat", "message"),
    [
        ({}, False, "needs a tokenizer with a chat_template"),
        ({"prompt_forms": ("plain",)}, True, "and chat among the prompt_forms"),
        ({"guard_tokens": 5}, True, r"would take \d+ tokens of every prompt, but guard_tokens allows 5"),
    ],
)
def test_a_guard_that_cannot_be_is_refused(changes: dict[str, Any], chat: bool, message: str) -> None:
    hparams, tokenizer = PromptGuardHyperParams(**changes), tiny_tokenizer(chat=chat)
    with pytest.raises(HyperParamsError, match=message):
        unlearn(tiny_model(), FORGET, method="prompt_guard", tokenizer=tokenizer, hparams=hparams)


def test_an_instruction_must_have_room_for_the_facts() -> None:
    with pytest.raises(HyperParamsError, match=r"must contain \{facts\}, where the facts go"):
        PromptGuardHyperParams(instruction="Say nothing.")
