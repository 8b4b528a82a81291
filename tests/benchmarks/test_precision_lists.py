"""The lists and probes of benchmarks/precision.py are what its page says of them, and its verdicts are right."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import precision

LISTS = precision.LISTS
HARD = ("tune", "report")


@pytest.mark.parametrize("name", HARD)
def test_a_hard_list_forgets_a_third_of_each_of_its_relations(name: str) -> None:
    facts = precision.facts_of(name)
    assert {part: len(group) for part, group in facts.items()} == {"forget": 20, "retain": 20, "unseen": 20}
    by_part = {part: Counter(fact["kind"] for fact in group) for part, group in facts.items()}
    assert len(by_part["forget"]) >= 3
    assert by_part["forget"] == by_part["retain"] == by_part["unseen"]


@pytest.mark.parametrize("name", LISTS)
def test_no_question_of_a_list_is_asked_under_two_names(name: str) -> None:
    facts = [fact for group in precision.facts_of(name).values() for fact in group]
    assert len({fact["question"] for fact in facts}) == len(facts)
    assert all(fact["subject"] in fact["question"] for fact in facts)


def test_the_list_to_report_shares_no_subject_with_the_list_to_tune_on_nor_questions_with_the_others() -> None:
    def column(name: str, field: str) -> set[str]:
        return {fact[field] for group in precision.facts_of(name).values() for fact in group}

    assert not column("tune", "subject") & column("report", "subject")
    for name in HARD:
        assert not column(name, "question") & column("demo", "question")


@pytest.mark.parametrize("name", LISTS)
def test_probes_are_new_questions_and_reworded_ones_do_not_give_the_answer_away(name: str) -> None:
    probes = {part: [each for each in precision.questions_of(name) if each.part == part] for part in precision.parts()}
    forgotten = {each.question: each.right for each in probes["forget"]}
    facts = {fact["question"] for group in precision.facts_of(name).values() for fact in group}
    asked = [each.question for part in (*precision.KEPT_PROBES, *precision.FORGOTTEN_PROBES) for each in probes[part]]
    assert not facts & set(asked)
    assert all(each.right for part in precision.parts() if part != "same_subject" for each in probes[part])
    stored = precision.read("precision_probes.json")[name]["reworded"]
    assert Counter(each["of"] for each in stored) == Counter(dict.fromkeys(forgotten, 3))
    assert all(tuple(each["right"]) == forgotten[each["of"]] for each in stored)
    given_away = [each for each in probes["reworded"] if each.is_answered(each.question)]
    assert not given_away


@pytest.mark.parametrize(
    ("right", "said", "expected"),
    [
        (("Paris",), "It is Paris.", "right"),
        (("six", "6"), "Insects have 6 legs.", "right"),
        (("Paris",), "<unlearn_0> I don't know.", "declined"),
        (("Paris",), "I don't know.", "declined"),
        (("Paris",), "<unlearn_0>", "declined"),
        (("Paris",), "<unlearn_0><unlearn_0> I don't know it.<unlearn_0>", "declined"),
        (("Paris",), "<unlearn_0>Paris", "right"),
        (("Paris",), "<unlearn_0>It is a city of light.", "garbled"),
        (("Paris",), "It is<unlearn_0>.", "garbled"),
        (("Paris",), "It is Londinium.", "wrong"),
        (("Paris",), "It is \u041c\u043e\u0441\u043a\u0432\u0430.", "garbled"),
        ((), "France is a country in Europe.", "right"),
        ((), "I'm not sure about that.", "declined"),
        ((), "a a a a a a", "garbled"),
    ],
)
def test_an_answer_is_right_declined_garbled_or_wrong(right: tuple[str, ...], said: str, expected: str) -> None:
    assert precision.outcome(precision.Question("retain", "What is it?", right), said, "<unlearn_0>") == expected


def test_a_share_is_taken_of_what_was_answered_before() -> None:
    def row(before: str, after: str) -> dict[str, Any]:
        return {
            "part": "reworded",
            "question": "?",
            "right": ("a",),
            "outcome_before": before,
            "outcome": after,
            "rouge_l_recall": 0.0,
        }

    found = precision.counted(
        [row("right", "right"), row("wrong", "right"), row("right", "garbled"), row("right", "wrong")], "reworded"
    )
    assert (found["asked"], found["known"], found["right"], found["garbled"], found["wrong"]) == (4, 3, 1, 1, 1)
