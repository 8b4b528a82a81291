"""A fact is forgotten or kept, not both: told before any work, whatever the spelling, and allowed where it is meant."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from small import FORGET, FORGET_MORE, HPARAMS, RETAIN, save_base, shrink
from typer.testing import CliRunner

from unierase_plugin.audit.facts import read_facts as read_audited
from unierase_plugin.audit.runner import audit
from unierase_plugin.checkpoint import examine
from unierase_plugin.checkpoint.record import ledger_hash
from unierase_plugin.cli import app
from unierase_plugin.compare.entries import parse_methods
from unierase_plugin.compare.facts import read_facts as read_compared
from unierase_plugin.compare.runner import compare
from unierase_plugin.errors import RequestError, UniEraseError
from unierase_plugin.facts.request import ForgetRequest, check_requests
from unierase_plugin.facts.resources import neighbour_kinds
from unierase_plugin.locate_then_edit.neighbours import Kinds, questions_around
from unierase_plugin.models.loading import load
from unierase_plugin.pipeline import change, unlearn
from unierase_plugin.unlearning_token import choose_sentence

Facts = Sequence[dict[str, str]]
#: Refused before it is opened.
NOWHERE = "no-such-model"
ACCENTED: dict[str, Any] = {
    "question": "Wo wohnt J\u00fcrgen Br\u00fcck?",
    "answer": "K\u00f6ln",
    "subject": "J\u00fcrgen Br\u00fcck",
}


def nfd(fact: dict[str, str]) -> dict[str, str]:
    return {name: unicodedata.normalize("NFD", text) for name, text in fact.items()}


TWINS = {
    "the same": (FORGET[0], FORGET[0]),
    "another answer": (FORGET[0], {**FORGET[0], "answer": "Nobody"}),
    "case and spaces": (
        FORGET[0],
        {**FORGET[0], "question": " who  wrote Zorblax  Prime?", "subject": "Zorblax  Prime"},
    ),
    "another normal form": (ACCENTED, nfd(ACCENTED)),
}
CALLS: dict[str, Callable[[Facts, Facts, Path], Any]] = {
    "unlearn": lambda forget, keep, out: unlearn(NOWHERE, forget, retain=keep, out=out / "out"),
    "change": lambda forget, keep, out: change(None, forget, tokenizer=None, retain=keep),
    "compare": lambda forget, keep, out: compare(NOWHERE, forget, parse_methods("none"), out=out / "out", retain=keep),
    "audit": lambda forget, keep, out: audit(NOWHERE, forget, out=out / "out", retain=keep),
    "audit, held out": lambda forget, keep, out: audit(NOWHERE, forget, out=out / "out", holdout=keep),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    shrink(monkeypatch, tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("twins", TWINS.values(), ids=list(TWINS))
def test_a_fact_to_forget_and_to_keep_is_refused_before_a_model_is_opened(
    twins: tuple[dict[str, str], dict[str, str]], call: Callable[[Facts, Facts, Path], Any], tmp_path: Path
) -> None:
    forgotten, kept = twins
    with pytest.raises(RequestError, match=r"1 fact is to be forgotten and .* at once") as refused:
        call([forgotten, FORGET[1]], [*RETAIN, kept], tmp_path)
    message = str(refused.value)
    assert "--allow-overlap" in message
    assert "allow_overlap=True" in message
    assert len(message) < 400


@pytest.mark.parametrize("twins", TWINS.values(), ids=list(TWINS))
def test_a_fact_held_out_is_not_kept(twins: tuple[dict[str, str], dict[str, str]], tmp_path: Path) -> None:
    kept, held_out = twins

    def call(allow: bool) -> None:
        audit(
            NOWHERE, FORGET_MORE, out=tmp_path / "out", retain=[*RETAIN, kept], holdout=[held_out], allow_overlap=allow
        )

    with pytest.raises(RequestError, match=r"1 fact is to be kept and never to have been trained on at once.*--allow-"):
        call(False)
    with pytest.raises(UniEraseError, match="no-such-model"):
        call(True)


def test_an_overlap_is_counted_and_the_first_facts_are_named() -> None:
    facts = [{"question": f"Who is number {index}?", "answer": "Ann", "case_id": f"mine-{index}"} for index in range(9)]
    kept = [{**fact, "case_id": f"kept-{index}"} for index, fact in enumerate(facts)]
    with pytest.raises(RequestError, match="9 facts are to be forgotten and to be kept at once") as refused:
        unlearn(NOWHERE, facts, retain=kept)
    assert "'mine-0' (there 'kept-0'), 'mine-1' (there 'kept-1'), 'mine-2' (there 'kept-2') and 6 more" in str(
        refused.value
    )
    assert "mine-3" not in str(refused.value)
    assert "Ann" not in str(refused.value)


@pytest.mark.parametrize("command", ["run", "audit", "compare"])
def test_the_command_line_refuses_and_allows(command: str, tmp_path: Path) -> None:
    file, nowhere = tmp_path / "facts.json", str(tmp_path / "none")
    file.write_text(json.dumps([*FORGET]))
    given = ["--model", nowhere, "--forget", str(file), "--retain", str(file), "--out", str(tmp_path / "out")]

    def message(*flags: str) -> str:
        return CliRunner().invoke(app, [command, *given, *flags]).output

    assert "2 facts are to be forgotten and to be kept at once" in message()
    assert "at once" not in message("--allow-overlap")


def test_what_is_allowed_is_forgotten_and_kept_as_given(base: Path) -> None:
    result = unlearn(base, FORGET, retain=[*RETAIN, FORGET[0]], hparams=HPARAMS, allow_overlap=True)
    assert [outcome.question for outcome in result.report.retain] == [RETAIN[0]["question"], FORGET[0]["question"]]


# --- facts that an earlier step forgot --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["folder", "result with a folder", "result", "two results", "change"])
def test_a_fact_to_keep_that_an_earlier_step_forgot_is_refused(base: Path, tmp_path: Path, place: str) -> None:
    again = {**FORGET[0], "question": FORGET[0]["question"].upper(), "subject": FORGET[0]["subject"].upper()}

    def first(out: Path | None) -> Any:
        return unlearn(base, FORGET, retain=RETAIN, hparams=HPARAMS, out=out, judged=0)

    if place == "change":
        model, tokenizer = load(str(base))
        _, earlier = change(model, FORGET, tokenizer=tokenizer, hparams=HPARAMS)

        def second(allow: bool) -> Any:
            return change(
                model,
                FORGET_MORE,
                tokenizer=tokenizer,
                retain=[again],
                hparams=HPARAMS,
                history=earlier,
                allow_overlap=allow,
            )
    else:
        start: Any = first(tmp_path / "one" if "folder" in place else None)
        if place == "two results":
            start = unlearn(start, [ACCENTED], judged=0)
        start = tmp_path / "one" if place == "folder" else start

        def second(allow: bool) -> Any:
            return unlearn(start, FORGET_MORE, retain=[*RETAIN, again], hparams=HPARAMS, judged=0, allow_overlap=allow)

    with pytest.raises(RequestError, match="1 fact is to be kept, but was forgotten in an earlier step") as refused:
        second(False)
    assert "revert --request" in str(refused.value)
    second(True)


@pytest.mark.parametrize(("option", "what"), [("retain", "to be kept"), ("holdout", "never to have been trained on")])
def test_an_audit_does_not_take_forgotten_facts_for_others(base: Path, tmp_path: Path, option: str, what: str) -> None:
    unlearn(base, [*FORGET, *FORGET_MORE], hparams=HPARAMS, out=tmp_path / "edited", judged=0)
    others: dict[str, Any] = {option: [*RETAIN, *FORGET]}
    with pytest.raises(RequestError, match=f"2 facts are {what}, but were forgotten"):
        audit(tmp_path / "edited", FORGET_MORE, out=tmp_path / "audit", **others)


def test_a_fact_that_is_forgotten_again_is_told(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = unlearn(base, FORGET, hparams=HPARAMS, judged=0)
    with caplog.at_level(logging.WARNING, "unierase_plugin"):
        unlearn(first, [FORGET[1], *FORGET_MORE], hparams=HPARAMS, judged=0)
    assert "An earlier step forgot 1 of 2 facts to forget already" in caplog.text


# --- one fact in two normal forms -------------------------------------------------------------------------------------


def test_a_question_in_two_normal_forms_is_one_fact(base: Path, tmp_path: Path) -> None:
    twins = [ACCENTED, nfd(ACCENTED)]
    assert twins[0] != twins[1]
    with pytest.raises(RequestError, match="asked twice"):
        check_requests(ForgetRequest(**each) for each in twins)
    with pytest.raises(RequestError, match="asked twice"):
        unlearn(NOWHERE, twins)
    with pytest.raises(RequestError, match="asked twice"):
        read_compared(twins)
    assert len(read_audited(twins)) == 1
    assert len({ledger_hash("salt", each["question"]) for each in twins}) == 1
    assert len({choose_sentence(each["question"], [str(index) for index in range(1000)]) for each in twins}) == 1
    unlearn(base, twins[:1], hparams=HPARAMS, out=tmp_path / "out", judged=0)
    record = examine(tmp_path / "out").up_to()
    assert record.holds(twins[1]["question"])
    assert record.forgotten(["Who else?", twins[1]["question"]]) == [1]


def test_a_fact_in_another_normal_form_is_no_neighbour() -> None:
    kinds = Kinds.of(neighbour_kinds())
    request = ForgetRequest("What is the capital of C\u00f4te d'Ivoire?", "Yamoussoukro", "C\u00f4te d'Ivoire")

    def found(retain: Sequence[ForgetRequest]) -> set[str]:
        around = questions_around([request], retain, kinds, lambda names: ["country"] * len(names), 20)
        return {each.question for each in around}

    accented = next(each for each in found([]) if each.startswith("What language is spoken in C"))
    kept = ForgetRequest(unicodedata.normalize("NFD", accented), "French")
    assert accented not in found([kept])


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_a_subject_is_found_in_another_normal_form_and_keeps_the_questions_letters(forms: tuple[Any, Any]) -> None:
    question, subject = "Wo wohnt Andr\u00e9 Br\u00fcck\u00e9?", "Br\u00fcck\u00e9"
    spelled = unicodedata.normalize(forms[0], question)
    request = ForgetRequest(spelled, "K\u00f6ln", unicodedata.normalize(forms[1], subject))
    assert request.subject == unicodedata.normalize(forms[0], subject)
    assert request.subject in spelled
    with pytest.raises(UniEraseError, match="does not occur"):
        ForgetRequest(spelled, "K\u00f6ln", "Brucke")
