"""Templates that let a model think first: facts are asked behind an empty thought, however the template writes it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from small import FORGET, HPARAMS, save_base, shrink
from tiny import CHATML, tiny_tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from unierase_plugin import cli, unlearn
from unierase_plugin.models.chat_templates import templated
from unierase_plugin.models.prompts import render
from unierase_plugin.models.thinking import Thinking, thinking_of, to_answer

EMPTY = "<think>\n\n</think>\n\n"
SHUT = "{{ '<think>\\n\\n</think>\\n\\n' }}"


def template(before_answer: str = "", at_start: str = "") -> str:
    """A ChatML template that writes something before an answer that is given, and where an answer is to begin."""
    given = f"{{%- if m['role'] == 'assistant' and loop.last %}}{before_answer}{{%- endif %}}"
    turn = f"{{{{ '<|im_start|>' + m['role'] + '\\n' }}}}{given}{{{{ m['content'] + '<|im_end|>\\n' }}}}"
    start = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}" + at_start + "{%- endif %}"
    return f"{{%- for m in messages %}}{turn}{{%- endfor %}}{start}"


#: The ways in which published templates write it, and what a prompt ends with then.
TEMPLATES = {
    # A switch that is on unless it is set, and an empty thought before a given answer (Qwen3).
    "switch and answer": (
        template(SHUT, "{%- if enable_thinking is defined and enable_thinking is false %}" + SHUT + "{%- endif %}"),
        f"<|im_start|>assistant\n{EMPTY}",
    ),
    # The same, but a given answer has no thought (SmolLM3).
    "switch alone": (
        template("", "{%- if enable_thinking is defined and not enable_thinking %}" + SHUT + "{%- endif %}"),
        f"<|im_start|>assistant\n{EMPTY}",
    ),
    # The prompt opens the thoughts, and nothing switches them off (DeepSeek-R1).
    "open": (template("", "{{ '<think>\\n' }}"), f"<|im_start|>assistant\n{EMPTY}"),
    # Channels: an answer has one of its own (gpt-oss).
    "channels": (
        template("{{ '<|channel|>final<|message|>' }}"),
        "<|im_start|>assistant\n<|channel|>final<|message|>",
    ),
}
#: Templates in which answers begin at once: nothing may change.
OTHERS = {
    "chatml": CHATML,
    # A switch that is off unless it is set (DeepSeek-V3.1, Granite).
    "off": template("", "{%- if thinking is defined and thinking %}{{ '<think>' }}{%- endif %}"),
    # Answers begin with a space (Mistral).
    "space": "{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{%- else %}{{ ' ' + m['content'] + '</s>' }}{%- endif %}{%- endfor %}",
    # It does not know add_generation_prompt.
    "no start": "{%- for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{%- endfor %}",
    "raises": "{{ raise_exception('no') }}",
}


def tokenizer_with(written: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = written
    return tokenizer


@pytest.fixture(params=TEMPLATES)
def case(request: pytest.FixtureRequest) -> tuple[Any, str]:
    written, end = TEMPLATES[request.param]
    return tokenizer_with(written), end


def test_a_prompt_ends_behind_an_empty_thought(case: tuple[Any, str]) -> None:
    tokenizer, end = case
    text = render(tokenizer, "Who is Ann?", "chat")
    assert text.endswith(f"Who is Ann?<|im_end|>\n{end}")
    thinks = render(tokenizer, "Who is Ann?", "chat", thinks=True)
    assert thinks == templated(tokenizer, [{"role": "user", "content": "Who is Ann?"}])
    assert thinks != text


def test_a_generated_text_is_parted_at_the_end_of_the_thoughts(case: tuple[Any, str]) -> None:
    tokenizer, _ = case
    thinking = thinking_of(tokenizer)
    assert thinking.mark in ("</think>", "<|channel|>final<|message|>")
    assert thinking.parted(f"Ann? Hm.{thinking.mark}A singer.") == ("Ann? Hm.", "A singer.")
    assert thinking.parted("Ann? Hm. She") == ("Ann? Hm. She", "")


@pytest.mark.parametrize("name", OTHERS)
def test_a_template_in_which_answers_begin_at_once_is_left_as_it_is(name: str) -> None:
    tokenizer = tokenizer_with(OTHERS[name])
    assert not thinking_of(tokenizer)
    assert thinking_of(tokenizer).parted("She sings.") == ("", "She sings.")
    if name != "raises":
        turns = [{"role": "user", "content": "Who?"}]
        assert to_answer(tokenizer, turns) == templated(tokenizer, turns)
    assert not thinking_of(tiny_tokenizer(chat=False))


def test_an_argument_that_the_user_gives_is_not_switched() -> None:
    tokenizer = tokenizer_with(TEMPLATES["switch alone"][0])
    assert thinking_of(tokenizer, {"enable_thinking": True}) == Thinking()
    assert render(tokenizer, "Who?", "chat", {"enable_thinking": True}).endswith("assistant\n")
    # The user has switched it off: it is not said twice.
    assert render(tokenizer, "Who?", "chat", {"enable_thinking": False}).count("</think>") == 1


def test_another_template_on_the_same_tokenizer_is_looked_at_anew() -> None:
    tokenizer = tokenizer_with(TEMPLATES["open"][0])
    assert thinking_of(tokenizer)
    tokenizer.chat_template = CHATML
    assert not thinking_of(tokenizer)


def test_a_tokenizer_is_saved_without_what_was_found(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TEMPLATES["open"][0])
    assert thinking_of(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert "unierase_thinking" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A tiny model with a thinking template, edited."""
    shrink(monkeypatch, tmp_path / "cache")
    base = save_base(tmp_path / "base", tokenizer=tokenizer_with(TEMPLATES["open"][0]))
    with caplog.at_level(logging.WARNING):
        unlearn(base, FORGET, hparams=HPARAMS, out=tmp_path / "out")
    assert "lets the model think before it answers" in caplog.text
    return tmp_path / "out"


def run(*arguments: str) -> None:
    done = CliRunner().invoke(cli.app, arguments)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output


def test_the_audit_reads_the_thoughts_and_asks_all_else_behind_them(edited: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([dict(fact) for fact in FORGET]))
    chosen = ["--attacks", "thinking", "--quick", "--device", "cpu"]
    run("audit", "--model", str(edited), "--forget", str(facts), "--out", str(tmp_path / "audit"), *chosen)
    found = json.loads((tmp_path / "audit/audit.json").read_text())
    attacks = {each["name"]: each for each in found["attacks"]}
    names = [variant["name"] for variant in attacks["thinking"]["variants"]["edited"]]
    assert names == ["thoughts", "answers after thinking"]
    prompts = {name: [each["prompt"] for each in attack["examples"]] for name, attack in attacks.items()}
    assert prompts["thinking"]
    assert prompts["plain"]
    assert all(prompt.endswith("<think>\n") for prompt in prompts["thinking"])
    assert all(prompt.endswith("</think>\n\n") for prompt in prompts["plain"])


def test_lm_eval_s_tasks_ask_behind_an_empty_thought(edited: Path, tmp_path: Path) -> None:
    named = ["eval", "--model", str(edited), "--tasks", "unierase_demo_forget", "--device", "cpu", "--limit", "2"]
    run(*named, "--log_samples", "--output_path", str(tmp_path / "results"))
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    contexts = [str(next(iter(row["arguments"].values()))["arg_0"]) for row in rows]
    assert len(contexts) == 2
    assert all(context.endswith("<think>\n\n</think>\n\n") for context in contexts)
