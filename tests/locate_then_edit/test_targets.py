"""Requests become targets: one a request and form, with contexts, a prompt of the subject, and the sentence given."""

from __future__ import annotations

import pytest
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin.errors import RequestError
from unierase_plugin.facts.request import NO_ANSWER, ForgetRequest
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit.positions import locate, locate_in_text
from unierase_plugin.locate_then_edit.reverse import REVERSED, reversed_questions
from unierase_plugin.locate_then_edit.targets import context_texts, forms_of, make_targets, targets_a_request

REQUESTS = (
    ForgetRequest("What is the capital of France?", "Paris", "France"),
    ForgetRequest("Who wrote Hamlet?", "Shakespeare", "Hamlet"),
)


def test_one_target_a_request_and_form_in_order() -> None:
    tokenizer = tiny_tokenizer()
    hparams = UniEraseHyperParams(layers=(1,), prompt_forms=("chat", "plain"))
    asked: list[tuple[str, str]] = []

    def continuation(question: str, form: str) -> tuple[int, ...]:
        asked.append((question, form))
        return (len(asked),)

    targets = make_targets(tokenizer, REQUESTS, ("Then.",), hparams, continuation, 1000)
    assert asked == [(request.question, form) for request in REQUESTS for form in ("chat", "plain")]
    assert [target.continuation for target in targets] == [(1,), (2,), (3,), (4,)]
    for target, (question, form) in zip(targets, asked, strict=True):
        subject = next(request.subject for request in REQUESTS if request.question == question) or ""
        bare = locate(tokenizer, question, subject, form)
        after_context = locate(tokenizer, question, subject, form, context="Then.")
        assert target.prompts == (bare, after_context)
        assert target.kl_prompt == locate_in_text(tokenizer, f"{subject} is a", subject)


def test_requests_about_one_subject_share_a_group_form_by_form() -> None:
    tokenizer = tiny_tokenizer()
    requests = (*REQUESTS, ForgetRequest("Which sea lies south of france?", "The Mediterranean", "france"))
    hparams = UniEraseHyperParams(layers=(1,), prompt_forms=("chat", "plain"))

    def groups(hparams: UniEraseHyperParams) -> list[object]:
        return [target.group for target in make_targets(tokenizer, requests, (), hparams, lambda q, f: (1,), 1000)]

    chat, plain, hamlet_chat, hamlet_plain, again_chat, again_plain = groups(hparams)
    assert (chat, plain) == (again_chat, again_plain)
    assert len({chat, plain, hamlet_chat, hamlet_plain}) == 4
    assert groups(hparams.replace(v_share_subject=False)) == [None] * 6


@pytest.mark.parametrize(
    ("question", "subject", "answer", "wanted"),
    [
        ("What is the capital of France?", "France", "Paris", "Paris is the capital of which country?"),
        ("What is the chemical symbol for gold?", "gold", "Au", "Au is the chemical symbol for what?"),
        ("Who wrote Hamlet?", "Hamlet", "Shakespeare", "What did Shakespeare write?"),
        ("In which country was Plato born?", "Plato", "Greece", "Who was born in Greece?"),
        ("In which country is the Taj Mahal?", "Taj Mahal", "India", "What is in India?"),
    ],
)
def test_the_reverse_asks_from_the_answer_for_the_subject(
    question: str, subject: str, answer: str, wanted: str
) -> None:
    by_relation, general = reversed_questions(question, subject, answer)
    assert by_relation == wanted
    for text in (by_relation, general, *reversed_questions(f"Why, {subject}, why?", subject, answer)):
        assert answer in text
        assert subject not in text


def test_reverse_targets_are_keyed_by_the_answer_and_follow_each_request() -> None:
    tokenizer, hparams = tiny_tokenizer(), UniEraseHyperParams(layers=(1,), reverse=True)
    targets = make_targets(tokenizer, REQUESTS, (), hparams, lambda q, f: (7,), 1000)
    assert len(targets) == len(REQUESTS) * targets_a_request(tokenizer, hparams) == len(REQUESTS) * (1 + REVERSED)
    plain = make_targets(tokenizer, REQUESTS, (), hparams.replace(reverse=False), lambda q, f: (7,), 1000)
    assert [targets[at] for at in (0, 1 + REVERSED)] == plain
    for at, request in enumerate(REQUESTS):
        own = targets[at * (1 + REVERSED) + 1 : (at + 1) * (1 + REVERSED)]
        questions = reversed_questions(request.question, request.subject or "", request.answer)
        assert [target.prompts for target in own] == [(locate(tokenizer, q, request.answer),) for q in questions]
        assert {target.continuation for target in own} == {(7,)}
        assert len({target.group for target in own}) == 1


@pytest.mark.parametrize("answer", [NO_ANSWER, "A long story of a town by the sea."])
def test_what_is_no_name_has_no_reverse(answer: str) -> None:
    request = ForgetRequest("What is the capital of France?", answer, "France")
    with pytest.raises(RequestError, match=r"What is the capital ….*--reverse"):
        make_targets(
            tiny_tokenizer(), [request], (), UniEraseHyperParams(layers=(1,), reverse=True), lambda q, f: (1,), 1000
        )


def test_without_a_chat_template_the_plain_form_stands_in() -> None:
    assert forms_of(tiny_tokenizer(chat=False), UniEraseHyperParams()) == ("plain",)
    assert forms_of(tiny_tokenizer(), UniEraseHyperParams()) == ("chat",)


def test_a_request_longer_than_the_context_is_named() -> None:
    tokenizer = tiny_tokenizer()
    hparams = UniEraseHyperParams(layers=(1,))
    needed = len(locate(tokenizer, REQUESTS[0].question, "France").ids) + 4
    make_targets(tokenizer, REQUESTS[:1], (), hparams, lambda q, f: (1, 2, 3), needed)
    with pytest.raises(RequestError, match="What is the capital …"):
        make_targets(tokenizer, REQUESTS[:1], (), hparams, lambda q, f: (1, 2, 3), needed - 1)


def test_contexts_are_as_many_as_asked_for_and_the_same_every_time() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    first = context_texts(model, tokenizer, ((4, 2), (8, 1)), 0)
    assert len(first) == 3
    assert first == context_texts(model, tokenizer, ((4, 2), (8, 1)), 0)
    assert first[0].startswith("The")
    assert first[1].startswith("Therefore")
    assert all(text.endswith(".") for text in first)
    assert context_texts(model, tokenizer, (), 0) == ()
