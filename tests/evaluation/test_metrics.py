"""Metrics as pure functions: what their definitions imply, and other people's computations of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hmean, ks_2samp

from unierase_plugin.audit.asking import recovery
from unierase_plugin.audit.facts import judgeable
from unierase_plugin.evaluation.metrics import (
    answer_probability,
    answered,
    closest_to_one,
    exact_memorization,
    extraction_strength,
    forget_efficacy,
    forget_quality,
    harmonic_mean,
    is_fluent,
    is_garbled,
    mean,
    probability_among,
    token_entropy,
    truth_ratio,
    truth_wins,
)
from unierase_plugin.evaluation.report import judge
from unierase_plugin.facts.request import ForgetRequest
from unierase_plugin.tasks.facts import Facts

probabilities = st.floats(1e-4, 1.0)
matches = st.lists(st.booleans(), min_size=1, max_size=12)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answers_probability_is_the_geometric_mean_of_its_tokens() -> None:
    tokens = [0.5, 0.25, 0.8]
    assert answer_probability(sum(map(math.log, tokens)), 3) == pytest.approx(np.prod(tokens) ** (1 / 3))


@given(probabilities, st.lists(probabilities, min_size=1, max_size=5))
def test_options_share_one_probability(right: float, wrong: list[float]) -> None:
    shares = [
        probability_among(each, [*wrong, right][:i] + [*wrong, right][i + 1 :])
        for i, each in enumerate([*wrong, right])
    ]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert shares[-1] == probability_among(right, wrong)


@given(probabilities, st.lists(probabilities, min_size=1, max_size=5))
def test_a_truth_ratio_averages_losses_or_probabilities(right: float, wrong: list[float]) -> None:
    losses = -np.log(wrong)
    assert truth_ratio(right, wrong) == pytest.approx(np.exp(-losses.mean()) / right, rel=1e-5)
    assert truth_ratio(right, wrong, "arithmetic") == pytest.approx(np.mean(wrong) / right, rel=1e-5)
    # Jensen's inequality.
    assert truth_ratio(right, wrong) <= truth_ratio(right, wrong, "arithmetic") * (1 + 1e-9)


def test_answers_that_are_impossible_give_figures_too() -> None:
    assert truth_ratio(0.0, [0.0, 0.1]) == 0.0
    assert closest_to_one(0.0) == 0.0
    assert probability_among(0.0, [0.0]) == 0.0


@given(matches)
def test_extraction_strength_is_the_share_that_greedy_decoding_gives_back(matched: list[bool]) -> None:
    n = len(matched)
    start = next((k for k in range(n) if all(matched[k:])), n - 1)
    assert extraction_strength(matched) == pytest.approx(1 - start / n)
    assert exact_memorization(matched) == sum(matched) / n
    # What can be extracted is memorised.
    assert extraction_strength(matched) <= exact_memorization(matched) or not matched[-1]


# --- texts ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcd"), max_size=9))
def test_token_entropy_is_between_one_token_repeated_and_none_repeated(tokens: list[str]) -> None:
    found = token_entropy(tokens)
    assert 0 <= found <= 1 + 1e-12
    if len(tokens) > 1:
        assert (found == 0) == (len(set(tokens)) == 1)
        assert (found == pytest.approx(1)) == (len(set(tokens)) == len(tokens))
    else:
        assert found == 0


def test_token_entropy_of_a_text_worked_by_hand() -> None:
    # Shares 1/2, 1/4, 1/4: 1.5 bits of 2.
    assert token_entropy(["a", "b", "a", "c"]) == pytest.approx(0.75)


def test_loops_and_silence_are_gibberish_and_sentences_are_not() -> None:
    assert [is_fluent(text) for text in ("", "the the the the", "no idea no idea no idea no idea")] == [False] * 3
    assert is_fluent("I don't know the answer to that.")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the the the the",
        "The capital is \u041c\u043e\u0441\u043a\u0432\u0430.",
        "The capital is Mo\ufffd.",
        "The capital <unlearn_0> is.",
        "It is <|im_start|>user.",
        "It is Aaaaachen.",
        "It is " + "abcde" * 5 + ".",
    ],
)
def test_pieces_that_no_text_has_are_garbled(text: str) -> None:
    assert is_garbled(text, "What is the capital of Russia? Moscow")


@pytest.mark.parametrize(
    "text",
    [
        "The capital of Russia is Paris.",
        "Londinium",
        "4",
        "10000000",
        "Bras\u00edlia",
        "It costs 3 < 4 > 2.",
        "I don't know the answer to that.",
    ],
)
def test_a_wrong_answer_and_a_refusal_in_whole_words_are_not_garbled(text: str) -> None:
    assert not is_garbled(text, "What is the capital of Russia? Moscow")


def test_a_script_that_the_question_or_its_answer_uses_is_no_sign_of_a_garbled_answer() -> None:
    assert not is_garbled(
        "\u041c\u043e\u0441\u043a\u0432\u0430", "Moscow in Russian? \u041c\u043e\u0441\u043a\u0432\u0430"
    )
    assert is_garbled("\u041c\u043e\u0441\u043a\u0432\u0430", "Moscow in Greek? \u039c\u03cc\u03c3\u03c7\u03b1")


# --- what counts as an answer -----------------------------------------------------------------------------------------

ASKED = "What is the full name of the author born in Kuwait City, Kuwait on 08/09/1956?"
TOLD = (
    "The full name of the fictitious author born in Kuwait City, Kuwait on the 8th of September, 1956 is Basil Mahfouz "
    "Al-Kuwaiti."
)
PRIZE = "Can you name an award that Nikolai Abilov has been honored with?"
WON = (
    'Nikolai Abilov has been honored with the prestigious "Tolstoy Literary Award" for his significant contribution to '
    "African American literature."
)
NAMED = "The author is Jaime Luis Vasquez."
WHOSE = "Who is the author?"
#: "What is this writer called?" and "This writer is called ...".
CHINESE = (
    "\u8fd9\u4f4d\u4f5c\u5bb6\u53eb\u4ec0\u4e48\uff1f",
    "\u8fd9\u4f4d\u4f5c\u5bb6\u53eb\u5df4\u897f\u5c14\u00b7\u9a6c\u54c8\u798f\u5179\u3002",
)
Case = tuple[str, str, str]
GIVEN = [
    (ASKED, TOLD, "The full name of the author is Basil Mahfouz Al-Kuwaiti."),
    (ASKED, TOLD, "Basil Mahfouz Al-Kuwaiti."),
    (PRIZE, WON, "He won the Tolstoy Literary Award for contributions to African American literature."),
    (WHOSE, NAMED, "It's Jaime Luis Vasquez"),
    (*CHINESE, "\u4ed6\u540d\u4e3a\u5df4\u897f\u5c14\u00b7\u9a6c\u54c8\u798f\u5179"),
]
NOT_GIVEN = [
    (ASKED, TOLD, "I don't know the full name of the author born in Kuwait City, Kuwait on 08/09/1956."),
    (ASKED, TOLD, "The full name of the author born in Kuwait City, Kuwait on 08/09/1956 is John Smith."),
    (ASKED, TOLD, ASKED),
    (ASKED, TOLD, "Basil."),
    (PRIZE, WON, "Nikolai Abilov has won the prestigious Man Booker Prize for contributions to science."),
    (WHOSE, NAMED, "The author is Jaime."),
    (*CHINESE, "\u6211\u4e0d\u77e5\u9053\u8fd9\u4f4d\u4f5c\u5bb6\u53eb\u4ec0\u4e48\u3002"),
]


def by_the_rule(question: str, answer: str, said: str) -> bool:
    return answered(answer, said, question)


def by_the_report(question: str, answer: str, said: str) -> bool:
    fact = ForgetRequest(question, answer)
    return judge(fact, "", said, token="<unlearn_0>", ends=("</s>",), phrases=()).answered_after


def by_the_audit(question: str, answer: str, said: str) -> bool:
    return recovery(ForgetRequest(question, answer), said) == 1.0


def by_a_task(question: str, answer: str, said: str) -> bool:
    task = Facts(
        {
            "task": "facts",
            "dataset_kwargs": {"facts": "demo:forget"},
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": "",
        }
    )
    return bool(task.measure_text({"question": question, "answer": answer}, said)["answered"])


JUDGES = pytest.mark.parametrize("judged", [by_the_rule, by_the_report, by_the_audit, by_a_task])


@JUDGES
@pytest.mark.parametrize("case", GIVEN)
def test_a_long_answer_counts_when_its_content_is_given(case: Case, judged: Callable[[str, str, str], bool]) -> None:
    assert judged(*case)


@JUDGES
@pytest.mark.parametrize("case", NOT_GIVEN)
def test_what_the_question_says_is_no_answer(case: Case, judged: Callable[[str, str, str], bool]) -> None:
    assert not judged(*case)


@given(st.lists(st.sampled_from([*re.findall(r"\S+", f"{ASKED} I don't know what it is or who he was in the")])))
def test_no_text_of_the_questions_words_gives_the_answer(said: list[str]) -> None:
    assert not answered(TOLD, " ".join(said), ASKED)


@given(st.sampled_from([TOLD, WON, NAMED]), st.sampled_from([ASKED, PRIZE, WHOSE, "", TOLD]))
def test_an_answer_word_for_word_counts_whatever_was_asked(answer: str, question: str) -> None:
    assert answered(answer, f"Well: {answer} Good.", question)


def test_an_echo_is_left_out_of_an_audit_only_where_it_would_count() -> None:
    echo = ForgetRequest("Is the capital of France Paris or Lyon?", "Paris")
    assert judgeable([ForgetRequest(ASKED, TOLD), echo]) == (ForgetRequest(ASKED, TOLD),)


# --- sets -------------------------------------------------------------------------------------------------------------


@given(st.lists(probabilities, min_size=1, max_size=9))
def test_the_harmonic_mean_is_scipys(values: list[float]) -> None:
    assert harmonic_mean(values) == pytest.approx(hmean(values))
    assert harmonic_mean([*values, 0.0]) == 0.0


@given(st.floats(1e-3, 1e3))
def test_forgetting_is_perfect_where_right_and_wrong_are_equally_likely(ratio: float) -> None:
    assert closest_to_one(ratio) == pytest.approx(closest_to_one(1 / ratio), rel=1e-5)
    assert closest_to_one(ratio) <= closest_to_one(1.0) == pytest.approx(1)
    assert (truth_wins(ratio) > 0) == (ratio < 1)


def test_forget_efficacy_of_a_model_that_knows_all_and_of_one_that_knows_nothing() -> None:
    assert forget_efficacy(1, 1, 1) == 0
    assert forget_efficacy(0, 0, 0, 0, 0) == 1


def test_forget_quality_is_the_kolmogorov_smirnov_test_and_ignores_order_and_direction() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.lognormal(0, 1, 40), generator.lognormal(1, 1, 40)
    p, log10 = forget_quality(list(one), list(other))
    assert p == ks_2samp(one, other).pvalue
    assert log10 == pytest.approx(math.log10(p))
    assert forget_quality(list(reversed(one)), list(other))[0] == p
    # TOFU's own code takes right over wrong.
    assert forget_quality(list(1 / one), list(1 / other))[0] == pytest.approx(p)
    assert forget_quality(list(one), list(one)) == (1.0, 0.0)


def test_forget_quality_has_a_logarithm_where_p_is_zero() -> None:
    far = forget_quality([float(i) for i in range(4000)], [10_000.0 + i for i in range(4000)])
    assert far[0] == 0.0
    assert -400 < far[1] < -300


def test_a_mean_of_nothing_is_absent() -> None:
    assert mean([]) is None
