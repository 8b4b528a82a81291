"""Chat templates are rendered once when a model is loaded: what is wrong with one is known before the work."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from small import FORGET, SHORT, save_base, shrink
from tiny import CHATML, tiny_tokenizer

from unierase_plugin import UniEraseHyperParams
from unierase_plugin.cli import main
from unierase_plugin.errors import HyperParamsError, UniEraseError
from unierase_plugin.models.chat_templates import check_chat_template, templated
from unierase_plugin.models.prompts import render

FAULTY = {
    "raises": ("{{ raise_exception('Only tools may speak.') }}", "TemplateError: Only tools may speak"),
    "raises at an answer": (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('No assistant here') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        "TemplateError: No assistant here",
    ),
    "wants an argument": ("{{ place.upper() }}{{ messages[0].content }}", "UndefinedError: 'place' is undefined"),
    "is no template": ("{% for %}", "TemplateSyntaxError: "),
    "has no end": ("{{ messages[0].content }}{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError: "),
    "has no default": ({"rag": CHATML, "tools": CHATML}, "has several chat templates and none that is the default: "),
}
LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{% endif %}Today Date: {{ date_string }}\n" + CHATML
)


@pytest.mark.parametrize(("template", "says"), FAULTY.values(), ids=FAULTY)
@pytest.mark.parametrize("command", ["run", "finetune", "stats", "audit"])
def test_a_template_that_cannot_be_rendered(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    template: Any,
    says: str,
    command: str,
) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr("unierase_plugin.models.loaded.model_fingerprint", lambda *_: pytest.fail("the work began"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    base = save_base(tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "a.jsonl").write_text(json.dumps(FORGET[0]) + "\n")
    (tmp_path / "good.yaml").write_text(json.dumps(SHORT))
    more = {
        "run": ["--forget", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--hparams", tmp_path / "good.yaml"],
        "finetune": ["--facts", tmp_path / "a.jsonl", "--out", tmp_path / "out"],
        "stats": ["--hparams", tmp_path / "good.yaml"],
        "audit": ["--forget", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--base", base],
    }[command]
    with pytest.raises(SystemExit) as ended:
        main([command, "--model", str(base), *map(str, more)])
    said = capsys.readouterr().err.replace("\n", " ")
    assert ended.value.code == 1
    assert says in said
    assert "save_pretrained" in said or "Give what it asks for in the setting chat_template_kwargs" in said


def test_a_template_with_a_default_and_one_that_is_given_what_it_wants() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "rag": "{{ nothing.here }}"}
    check_chat_template(tokenizer)
    tokenizer.chat_template = "{{ place | default('') | upper }}" + CHATML
    check_chat_template(tokenizer, {"place": "Paris"})
    tokenizer.chat_template = None
    check_chat_template(tokenizer)


def test_a_question_at_which_a_template_raises_is_an_error_of_ours() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if 'Ann' in messages[0].content %}{{ raise_exception('Not her') }}{% endif %}{{ messages[0].content }}"
    )
    check_chat_template(tokenizer)
    with pytest.raises(UniEraseError, match=r"cannot be rendered \(TemplateError: Not her\)"):
        render(tokenizer, "Who is Ann?", "chat")


@pytest.mark.parametrize(
    "name", ["self", "conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message"]
)
def test_an_argument_that_every_template_is_given(name: str) -> None:
    with pytest.raises(HyperParamsError, match=f"chat_template_kwargs has '{name}', which every chat template gets"):
        UniEraseHyperParams(chat_template_kwargs={name: True})
    turns = [{"role": "user", "content": "?"}]
    with pytest.raises((TypeError, ValueError)):
        tiny_tokenizer().apply_chat_template(
            turns, **{"tokenize": False, "add_generation_prompt": True}, **{name: True}
        )


@pytest.mark.parametrize(
    ("template", "settings", "says"),
    [
        (LLAMA, {}, 'The setting chat_template_kwargs: {date_string: "'),
        (LLAMA, {"date_string": "26 Jul 2024"}, None),
        (CHATML, {}, None),
        (
            "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + CHATML,
            {},
            "The template has no setting for it: write the date into it",
        ),
        ("{% set day = today or strftime_now('%Y-%m-%d') %}{{ day }}" + CHATML, {}, "kwargs: {today: "),
        ("{% if dated %}{{ strftime_now('%Y') }}{% endif %}" + CHATML, {}, None),
        ("{% if dated %}{{ strftime_now('%Y') }}{% endif %}" + CHATML, {"dated": True}, "writes the date into every"),
    ],
)
def test_a_date_in_the_prompt_is_told_once_with_its_remedy(
    caplog: pytest.LogCaptureFixture, template: str, settings: dict[str, Any], says: str | None
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with caplog.at_level(logging.WARNING):
        check_chat_template(tokenizer, settings)
    assert len(caplog.records) == (says is not None)
    assert (says or "") in caplog.text


def test_the_remedy_gives_the_prompt_of_today(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LLAMA
    check_chat_template(tokenizer)
    day = caplog.text.partition('date_string: "')[2].partition('"')[0]
    now = templated(tokenizer, [{"role": "user", "content": "?"}])
    assert datetime.strptime(day, "%d %b %Y")
    assert templated(tokenizer, [{"role": "user", "content": "?"}], {"date_string": day}) == now
