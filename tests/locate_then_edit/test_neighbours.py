"""Neighbours: what is asked around a fact to forget, and that none of it is such a fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from unierase_plugin.evaluation.metrics import answered
from unierase_plugin.facts.request import NO_ANSWER, ForgetRequest
from unierase_plugin.facts.resources import demo_facts, lines, neighbour_kinds
from unierase_plugin.locate_then_edit.neighbours import (
    ASKED_PER_WANTED,
    SUBJECT_FACTS,
    WAYS,
    Kinds,
    Neighbour,
    questions_around,
    spared,
)

KINDS = Kinds.of(neighbour_kinds())
FRANCE = ForgetRequest("What is the capital of France?", "Paris", "France")
EGYPT = ForgetRequest("What is the capital of Egypt?", "Cairo", "Egypt")
KENYA = ForgetRequest("What is the capital of Kenya?", "Nairobi", "Kenya")
DEMO = [ForgetRequest(fact["question"], fact["answer"], fact["subject"]) for fact in demo_facts()["forget"]]
DEMO_KEPT = [ForgetRequest(fact["question"], fact["answer"], fact["subject"]) for fact in demo_facts()["retain"]]
REFUSALS = lines("idk_phrases")


def as_work(subjects: Sequence[str]) -> list[str]:
    return ["work"] * len(subjects)


def around(
    *requests: ForgetRequest, wanted: int = 6, retain: Sequence[ForgetRequest] = (), avoid: Sequence[str] = ()
) -> Any:
    return questions_around(requests, retain, KINDS, as_work, wanted, avoid)


def near(question: str, subject: str = "France", of: int = 0) -> Neighbour:
    return Neighbour(question, subject, "subject", of)


# --- the questions ---------------------------------------------------------------------------------------------------


def test_all_three_ways_lead_away_from_a_fact() -> None:
    found = around(FRANCE)
    assert {each.way for each in found} == set(WAYS)
    by_way = {way: [each for each in found if each.way == way] for way in WAYS}
    assert all(each.question == f"What is the capital of {each.subject}?" for each in by_way["relation"])
    assert all("France" in each.question and each.subject == "France" for each in by_way["subject"])
    assert all(each.question.startswith("What is the") for each in by_way["template"])


def test_no_neighbour_is_a_fact_to_forget_or_to_keep_or_asked_twice() -> None:
    found = around(*DEMO, wanted=20, retain=DEMO_KEPT)
    questions = [each.question.casefold() for each in found]
    assert len(questions) > 300
    assert len(set(questions)) == len(questions)
    assert not set(questions) & {fact.question.casefold() for fact in (*DEMO, *DEMO_KEPT)}
    assert all(each.subject in each.question for each in found)


def test_a_rewording_of_a_fact_is_no_neighbour() -> None:
    """The relations of a country ask for its capital, which here is to be forgotten under other words."""
    asked = ForgetRequest("Which city is the capital of France?", "Paris", "France")
    assert "What is the capital of France?" not in [each.question for each in around(asked, wanted=60)]
    # Control: where something else is to be forgotten, the capital is a neighbour.
    other = ForgetRequest("What is the currency of France?", "the euro", "France")
    assert "What is the capital of France?" in [each.question for each in around(other, wanted=60)]


def test_another_subject_takes_the_place_of_the_name_and_not_of_a_longer_word() -> None:
    fact = ForgetRequest("Is France the capital-holder, or are the Francelanders?", "It", "France")
    asked = [each for each in around(fact) if each.way == "relation"]
    assert asked
    assert all(each.question == f"Is {each.subject} the capital-holder, or are the Francelanders?" for each in asked)


def test_another_request_is_no_neighbour_either() -> None:
    every = [each.question for each in around(FRANCE, EGYPT, wanted=200)]
    assert "What is the capital of Egypt?" in [each.question for each in around(FRANCE, wanted=200)]
    assert not {FRANCE.question, EGYPT.question} & set(every)


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_a_request_has_no_more_questions_than_were_wanted_and_some_to_spare(wanted: int) -> None:
    found = around(FRANCE, EGYPT, wanted=wanted)
    for index in range(2):
        assert 0 < sum(each.of == index for each in found) <= round(ASKED_PER_WANTED * wanted)


def test_subjects_of_kept_facts_of_the_kind_are_asked_about_as_well() -> None:
    kinds = Kinds({"country": "a country"}, {"country": ("France", "Kenya")}, {"country": ()}, (), ())
    asked = ForgetRequest("What is the currency of France?", "the euro", "France")
    found = questions_around([asked], [KENYA], kinds, as_work, 5)
    assert [each.question for each in found] == ["What is the currency of Kenya?"]


def test_the_model_is_asked_for_the_kinds_of_unlisted_subjects_alone() -> None:
    asked: list[str] = []

    def guess(subjects: Sequence[str]) -> list[str]:
        asked.extend(subjects)
        return ["person"] * len(subjects)

    nobody = ForgetRequest("Where was Mira Plonk born?", "Wexbury", "Mira Plonk")
    found = questions_around([FRANCE, nobody, nobody], [], KINDS, guess, 4)
    assert asked == ["Mira Plonk"]
    assert "What is Mira Plonk known for?" in [each.question for each in found]


def test_a_subject_of_many_facts_is_itself_what_is_to_be_forgotten() -> None:
    facts = [
        ForgetRequest(f"What is the {thing} of France?", "It", "France")
        for thing in ("anthem", "motto", "national bird", "national tree")[: SUBJECT_FACTS + 1]
    ]
    assert "subject" in {each.way for each in around(*facts[:SUBJECT_FACTS])}
    assert {each.way for each in around(*facts)} == {"relation"}


def test_without_an_answer_only_other_subjects_are_asked_about() -> None:
    unsaid = ForgetRequest("What is the capital of France?", NO_ANSWER, "France")
    assert {each.way for each in around(unsaid)} == {"relation"}


def test_the_reverse_is_not_asked_where_it_is_to_be_forgotten() -> None:
    asked = ForgetRequest("What is the largest city of France?", "Egypt", "France")
    assert any("Egypt" in each.question for each in around(asked, wanted=200))
    assert not any("Egypt" in each.question for each in around(asked, wanted=200, avoid=["Egypt"]))


def test_two_questions_of_one_template_have_other_neighbours_and_every_run_the_same() -> None:
    of_france, of_egypt = (
        {each.subject for each in around(fact) if each.way == "relation"} for fact in (FRANCE, EGYPT)
    )
    assert of_france != of_egypt
    assert around(FRANCE, EGYPT) == around(FRANCE, EGYPT)


# --- what the model says ---------------------------------------------------------------------------------------------


def test_an_answer_is_kept_up_to_the_sentence_that_tells_the_fact() -> None:
    said = "France is a country in Europe. Its capital is Paris. It has many rivers."
    assert spared(near("Tell me about France."), said, [FRANCE], REFUSALS) == "France is a country in Europe."
    assert spared(near("Tell me about France."), said, [EGYPT], REFUSALS) == said


@pytest.mark.parametrize(
    "answer", ["It is Paris.", "I don't know.", "", "the the the the the the", "France has Paris as its capital"]
)
def test_a_question_with_such_an_answer_is_no_neighbour(answer: str) -> None:
    assert spared(near("Which city is large in France?"), answer, [FRANCE], REFUSALS) is None


def test_another_requests_fact_is_not_told_either() -> None:
    neighbour = near("Which city is older than Paris?", "Paris", 0)
    assert spared(neighbour, "Cairo, in Egypt, is older.", [FRANCE, EGYPT], REFUSALS) is None
    # Its answer alone, about something else, is no fact to forget.
    assert spared(neighbour, "Cairo, in Illinois, is not older.", [FRANCE, EGYPT], REFUSALS) is not None


def test_what_is_kept_never_gives_the_forgotten_answer() -> None:
    """Whatever is said about any demo fact: every sentence of it and every answer together."""
    said = " ".join(f"{fact.subject} goes with {fact.answer}." for fact in DEMO)
    for each in around(*DEMO, wanted=6):
        kept = spared(each, f"This is something to keep. {said}", DEMO, REFUSALS)
        assert kept is None or not answered(DEMO[each.of].answer, kept)
