"""An answer follows a prompt in one way, whoever puts it there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import job_of
from small import FORGET, HPARAMS, LINES, RETAIN, shrink
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin import unlearn
from unierase_plugin.audit.contract import FULL, QUICK
from unierase_plugin.audit.prompts import answer_ids
from unierase_plugin.evaluation.answers import OF_COMPARISONS, OF_FINETUNING, OF_RUNS, AnswerLength
from unierase_plugin.facts.request import ForgetRequest
from unierase_plugin.locate_then_edit.positions import locate
from unierase_plugin.locate_then_edit.targets import make_targets
from unierase_plugin.methods.contract import Job
from unierase_plugin.methods.editing.engine import Editing
from unierase_plugin.methods.editing.goals import GOALS
from unierase_plugin.methods.editing.rome_memit_alphaedit import MEMITHyperParams
from unierase_plugin.methods.neighbours import Kept
from unierase_plugin.models.examples import answered
from unierase_plugin.models.prompts import answer_text, encode, render

FACT = ForgetRequest("Who is Ann?", "Bob", "Ann")
#: What stands between a prompt and the answer's first letter.
SPACES = {"chat": "", "plain": " ", "bare": " "}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, tmp_path / "cache")


def written(ids: Any, form: str) -> str:
    """What a sequence says after the prompt, up to the end."""
    tokenizer = tiny_tokenizer()
    prompt = encode(tokenizer, render(tokenizer, FACT.question, form), form)
    assert list(ids)[: len(prompt)] == prompt
    return str(tokenizer.decode([token for token in list(ids)[len(prompt) :] if token != 2]))


def job(hparams: Any) -> Job[Any]:
    return job_of(tiny_model(), tiny_tokenizer(), (FACT,), (FACT,), hparams)


@pytest.mark.parametrize("form", SPACES)
def test_all_that_write_an_answer_write_the_same(form: str) -> None:
    tokenizer, wanted = tiny_tokenizer(), SPACES[form] + "Bob"
    assert answer_text(tokenizer, "Bob", form) == wanted
    # What a fine-tuned model, a removal, an edit's statistics and an edit's targets read.
    assert written(answered(tokenizer, FACT.question, "Bob", form, 2, {}).ids, form) == wanted
    editing = Editing(job(HPARAMS.replace(prompt_forms=(form,), harden=("unlikely_answer",))), GOALS["token"])
    editing.kept = Kept((), (FACT,))
    (kept,) = editing._protection(None)._kept_tokens()
    assert written(kept, form) == wanted
    (target,) = make_targets(tokenizer, (FACT,), (), editing.hparams, lambda q, f: (5,), 200)
    assert tokenizer.decode(target.unwanted) == wanted
    # What an audit asks for.
    subject, context = SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(form=form)
    assert tokenizer.decode(answer_ids(subject, context, "Bob")) == wanted  # type: ignore[arg-type]
    assert tokenizer.decode(answer_ids(subject, context, "Bob", prefill=True)) == " Bob"  # type: ignore[arg-type]
    # And what is said in its place, where no token comes first.
    plain = Editing(job(MEMITHyperParams(layers=(1,), prompt_forms=(form,), target="idk")), GOALS["idk"])
    (instead,) = plain.goal.targets(plain, {})
    assert instead.opening is not None
    said = tokenizer.decode([instead.opening, *instead.continuation][:-1])
    assert said in {SPACES[form] + sentence for sentence in LINES["idk_sentences"]}


@pytest.mark.parametrize("form", SPACES)
def test_a_space_that_is_there_already_is_not_doubled(form: str) -> None:
    assert answer_text(tiny_tokenizer(), " Bob", form) == " Bob"
    assert answer_text(tiny_tokenizer(chat=False), "Bob", form) == " Bob"


@pytest.mark.parametrize("form", SPACES)
def test_a_run_in_every_form_protects_the_answers_keys(form: str) -> None:
    """From the subject's last token to the answer's last, whatever stands before the answer."""
    result = unlearn(
        tiny_model(),
        FORGET,
        tokenizer=tiny_tokenizer(),
        retain=RETAIN,
        hparams=HPARAMS.replace(prompt_forms=(form,), retain_key_weight=1.0),
    )
    (fact,) = RETAIN
    tokenizer = tiny_tokenizer()
    asked = locate(tokenizer, fact["question"], fact["subject"], form)
    answer = tokenizer(SPACES[form] + fact["answer"], add_special_tokens=False)["input_ids"]
    wanted = len(asked.ids) - asked.position + len(answer)
    assert result.report.as_dict()["edit"]["protected"]["keys"] == wanted


@pytest.mark.parametrize(
    ("length", "tokens"),
    [
        (OF_RUNS, (32, 32, 38, 128)),
        (OF_FINETUNING, (8, 13, 38, 128)),
        (OF_COMPARISONS, (32, 32, 38, 200)),
        (QUICK.answers, (20, 20, 38, 40)),
        (FULL.answers, (32, 32, 38, 128)),
    ],
)
def test_an_answer_may_be_somewhat_longer_than_the_longest_true_one(
    length: AnswerLength, tokens: tuple[int, ...]
) -> None:
    cases: tuple[list[int], ...] = ([], [5, 2], [2, 30], [1000])
    assert tuple(map(length.tokens, cases)) == tokens
