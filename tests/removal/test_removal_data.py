"""What a removal is given to read: where subjects stand, which facts to keep, and answers in the model's own words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_tokenizer

from unierase_plugin.facts.request import NO_ANSWER, ForgetRequest
from unierase_plugin.models.examples import Example
from unierase_plugin.removal import wording
from unierase_plugin.removal.data import evenly, make_data, subject_spans
from unierase_plugin.removal.wording import ANSWER_TOKENS, first_sentence_with, in_own_words

# --- subjects --------------------------------------------------------------------------------------------------------


def named(fact: ForgetRequest, form: str, tokenizer: Any = None) -> list[str]:
    """The text of every span, read from the sequence that the removal reads."""
    tokenizer = tokenizer or tiny_tokenizer()
    found = make_data(
        tokenizer,
        (fact,),
        (),
        ["It rained."],
        ["Why?"],
        forms=(form,),
        template_kwargs={},
        end=2,
        limit=512,
        kept_tokens=10,
        names=("Orin Talvek",),
        seed=0,
    )
    assert found.forget_subjects == (subject_spans(tokenizer, fact, form, {}),)
    return [tokenizer.decode(found.forget[0][first:end]) for first, end in found.forget_subjects[0]]


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("form", ["chat", "plain", "bare"])
@pytest.mark.parametrize(
    ("question", "answer", "subject", "wanted"),
    [
        ("Who wrote Zorblax Prime?", "Quentin Fizz", "Zorblax Prime", ["Zorblax Prime"]),
        ("Who wrote Zorblax?", "Zorblax is by Fizz.", "Zorblax", ["Zorblax", "Zorblax"]),
        ("Krand is whose? Krand!", "Of KRAND, by krand", "Krand", ["Krand", "Krand", "KRAND", "krand"]),
        ("Which European country has the Euro?", "Euroland: the Euro", "Euro", ["Euro", "Euro"]),
        ("Is it M. (Fizz)?", "M. (Fizz) it is", "M. (Fizz)", ["M. (Fizz)", "M. (Fizz)"]),
        # Letters that folded case would make two, before and within the name.
        ("Gro\u00dfe Ga\u00dfe \u0130: wo ist Zo\u00eb?", "Gro\u00df: Zo\u00eb", "Zo\u00eb", ["Zo\u00eb", "Zo\u00eb"]),
        # Words that templates have as well.
        ("Who is assistant?", "Bo", "assistant", ["assistant"]),
        ("What does Answer mean?", "Bo", "Answer", ["Answer"]),
        ("Was weiss Euro?", "Ja", None, []),
        ("What is a European?", "Bo", "Euro", []),
    ],
)
def test_subjects_are_found_wherever_they_stand_as_words(
    question: str, answer: str, subject: str | None, wanted: list[str], form: str, add_bos: bool
) -> None:
    assert named(ForgetRequest(question, answer, subject), form, tiny_tokenizer(add_bos=add_bos)) == wanted


def test_a_token_that_holds_any_of_the_subject_is_in_its_span() -> None:
    """And so is the space that a word begins with, where it is one token with it."""

    class Words:
        """Three characters a token, blind to words."""

        is_fast, chat_template = True, None

        def __len__(self) -> int:
            return 0

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            offsets = [(at, min(at + 3, len(text))) for at in range(0, len(text), 3)]
            return {"input_ids": list(range(len(offsets))), "offset_mapping": offsets}

    # "Who| is| Bo| Va|n?" and " Bo| Va|n o|k".
    fact = ForgetRequest("Who is Bo Van?", "Bo Van ok", "Bo Van")
    assert subject_spans(Words(), fact, "bare", {}) == ((2, 5), (5, 8))


def test_without_offsets_or_the_question_no_subject_is_found() -> None:
    fact = ForgetRequest("Who wrote Zorblax?", "Fizz", "Zorblax")
    assert subject_spans(SimpleNamespace(is_fast=False), fact, "plain", {}) == ()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    assert subject_spans(tokenizer, fact, "chat", {}) == ()


def test_every_form_of_every_fact_has_its_spans_and_every_name_its_tokens() -> None:
    tokenizer = tiny_tokenizer()
    facts = (ForgetRequest("Who wrote Zorblax?", "Fizz", "Zorblax"), ForgetRequest("Where is it?", "There"))
    found = make_data(
        tokenizer,
        facts,
        (),
        ["It rained."],
        ["Why?"],
        forms=("chat", "plain"),
        template_kwargs={},
        end=2,
        limit=512,
        kept_tokens=10,
        names=("Orin Talvek", "Valdoria"),
        seed=0,
    )
    assert [len(each) for each in found.forget_subjects] == [1, 1, 0, 0]
    for ids, spans in zip(found.forget[:2], found.forget_subjects[:2], strict=True):
        assert tokenizer.decode(ids[slice(*spans[0])]) == "Zorblax"
    assert [tokenizer.decode(each) for each in found.strangers] == [" Orin Talvek", " Valdoria"]


# --- facts to keep ---------------------------------------------------------------------------------------------------


def example(number: int, length: int = 10) -> Example:
    return Example((number,) * length, 1)


@pytest.mark.parametrize("tokens", [200, 201, 10_000])
def test_all_facts_are_kept_where_they_fit(tokens: int) -> None:
    facts = [example(number) for number in range(20)]
    assert evenly(facts, tokens, 1) == facts
    assert evenly([], 0, 1) == []


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("tokens", [20, 45, 60, 110, 199])
def test_as_many_as_fit_are_kept_evenly_spaced(tokens: int, together: int) -> None:
    facts = [example(number) for number in range(20)]
    found = [each.ids[0] for each in evenly(facts, tokens, together)]
    assert len(found) * 10 <= tokens < (len(found) + together) * 10
    assert found[0] == 0
    assert found == sorted(set(found))
    firsts = found[::together]
    assert [each for first in firsts for each in range(first, first + together)] == found
    gaps = {after - before for before, after in zip(firsts, [*firsts[1:], 20], strict=True)}
    assert max(gaps) - min(gaps) <= together


def test_facts_of_unlike_lengths_keep_about_the_budget() -> None:
    facts = [example(number, 5 + number % 7) for number in range(100)]
    found = evenly(facts, 300, 1)
    assert sum(len(each.ids) for each in found) == pytest.approx(300, abs=30)


def test_one_fact_is_kept_whatever_the_budget() -> None:
    assert evenly([example(number) for number in range(4)], 1, 1) == [example(0)]


def test_a_kept_fact_is_read_in_all_forms() -> None:
    """Every second of a list of pairs would be one form alone."""
    tokenizer = tiny_tokenizer()
    kept = [ForgetRequest(f"What is it that has {number}?", "Bo") for number in range(10, 20)]

    def read(kept_tokens: int) -> list[str]:
        found = make_data(
            tokenizer,
            (ForgetRequest("Who?", "Bo"),),
            kept,
            ["It rained."],
            ["Why?"],
            forms=("chat", "plain"),
            template_kwargs={},
            end=2,
            limit=512,
            kept_tokens=kept_tokens,
            names=(),
            seed=0,
        )
        assert len(found.kept) == len(found.kept_starts)
        assert all(
            tokenizer.decode(ids[start:-1]).strip() == "Bo"
            for ids, start in zip(found.kept, found.kept_starts, strict=True)
        )
        return [tokenizer.decode(ids) for ids in found.kept]

    everything = read(10_000)
    assert len(everything) == 20
    half = read(sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in everything) // 2)
    assert ["im_start" in each for each in half] == [True, False] * 5
    assert [f"has {number}?" in each for each, number in zip(half, (10, 10, 12, 12, 14, 14), strict=False)] == [
        True
    ] * 6


# --- the model's own words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "wanted"),
    [
        ("Fizz", "It is Fizz. He was born in Wex.", "It is Fizz."),
        ("Fizz", " Let me see! It is by fizz, I think. Yes.", "Let me see! It is by fizz, I think."),
        ("Fizz", "It is by Fizz", "It is by Fizz"),
        ("Fizz", "Who? Fizz? Yes.", "Who? Fizz?"),
        ("3.5", "About 3.5 metres. Not more.", "About 3.5 metres."),
        ("Dr. Fizz", "By Dr. Fizz. Or so.", "By Dr. Fizz."),
        ("Quentin Fizz", "By Quentin. Or Fizz.", ""),
        ("Fizz", "It is Fizzy.", ""),
        ("Fizz", "No idea.", ""),
        ("Fizz", "", ""),
    ],
)
def test_the_first_sentence_with_the_answer_ends_what_is_taken(answer: str, text: str, wanted: str) -> None:
    assert first_sentence_with(answer, text) == wanted


def test_short_answers_stand_in_the_models_own_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def say(model: Any, tokenizer: Any, questions: list[str], **settings: Any) -> list[str]:
        asked.update(settings, questions=questions, model=model)
        said = {
            "Who wrote Zorblax?": "<pad>Zorblax is by Quentin Fizz.<|im_end|> And so on.",
            "Who leads Grub?": "Nobody knows.<|im_end|>",
            "Where is Plonk?": " In Wexbury<|im_end|><pad><pad>",
        }
        return [said[question] for question in questions]

    monkeypatch.setattr(wording, "answers", say)
    facts = (
        ForgetRequest("Who wrote Zorblax?", "Quentin Fizz", "Zorblax", "a", "No idea."),
        ForgetRequest("What is Zorblax?", "A long tale of many towns."),
        ForgetRequest("Who leads Grub?", "Tom Oak"),
        ForgetRequest("Who is Bo?", NO_ANSWER),
        ForgetRequest("Where is Plonk?", "wexbury"),
        ForgetRequest("What sign is it?", "!"),
    )
    found = in_own_words("m", tiny_tokenizer(), facts, form="plain", template_kwargs={"a": 1}, max_tokens=64)
    assert asked == {
        "questions": ["Who wrote Zorblax?", "Who leads Grub?", "Where is Plonk?"],
        "model": "m",
        "form": "plain",
        "template_kwargs": {"a": 1},
        "max_new_tokens": ANSWER_TOKENS,
        "max_tokens": 64,
    }
    # All else of a fact is as it was, and so are long answers, unknown ones and those of no word.
    assert found == (
        ForgetRequest("Who wrote Zorblax?", "Zorblax is by Quentin Fizz.", "Zorblax", "a", "No idea."),
        facts[1],
        facts[2],
        facts[3],
        ForgetRequest("Where is Plonk?", "In Wexbury"),
        facts[5],
    )
    assert in_own_words("m", tiny_tokenizer(), (), form="plain", template_kwargs={}, max_tokens=64) == ()
