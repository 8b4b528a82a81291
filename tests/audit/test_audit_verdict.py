"""The verdict's rule, case by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from unierase_plugin.audit.attacks import ATTACKS
from unierase_plugin.audit.contract import EDITED, GROUPS, REFERENCE, UNEDITED, AttackResult, Measure, Value
from unierase_plugin.audit.verdict import Finding, Verdict, compare, find_damage, judge

N = 60
BY_NAME = {attack.name: attack for attack in ATTACKS}
#: One attack of every group but the collateral one.
ONE_EACH = ("plain", "prefill", "spellings", "leak-at-k", "quantise", "relearn-text", "logit-lens")
KNOWN = {EDITED: 0, UNEDITED: 50, REFERENCE: 0}


def result(hits: int, n: int = N, chance: float = 0.0) -> AttackResult:
    values: tuple[Value, ...] = (1.0,) * hits + (0.0,) * (n - hits)
    return AttackResult((Measure("only", values, ((chance,) * n,)),))


def found(name: str, hits: Mapping[str, int], n: int = N) -> Finding:
    finding = compare(BY_NAME[name], {role: result(count, n) for role, count in hits.items()})
    assert finding is not None
    return finding


def collateral(kept: Sequence[Value] = (1.0,) * 40, level: float = 10.0) -> dict[str, dict[str, AttackResult]]:
    fine = (0.0,) * 40

    def retention(answered: Sequence[Value]) -> AttackResult:
        return AttackResult(
            series={
                "kept_answered": answered,
                "kept_refused": fine,
                "unrelated_refused": fine,
                "unrelated_fluent": (1.0,) * 40,
            }
        )

    return {
        "retention": {UNEDITED: retention((1.0,) * 40), EDITED: retention(kept)},
        "ordinary-text": {
            UNEDITED: AttackResult(series={"perplexity": [10.0] * 8}),
            EDITED: AttackResult(series={"perplexity": [level] * 8}),
        },
    }


def verdict(
    changes: Mapping[str, Mapping[str, int]] | None = None,
    *,
    not_run: Mapping[str, str] | None = None,
    complete: bool = True,
    names: Sequence[str] = ONE_EACH,
    n: int = N,
    roles: Sequence[str] = tuple(KNOWN),
    others: Mapping[str, Mapping[str, AttackResult]] | None = None,
    membership: Mapping[str, AttackResult] | None = None,
) -> Verdict:
    """The verdict where no attack finds anything, but for what is changed."""
    hits = {name: {role: KNOWN[role] for role in roles} | dict((changes or {}).get(name, {})) for name in names}
    findings = [found(name, counts, n) for name, counts in hits.items()]
    damage = find_damage(others if others is not None else collateral())
    return judge(findings, damage, not_run or {}, complete=complete, membership=membership)


def test_removed_needs_everything() -> None:
    assert verdict().text.startswith("removed:")
    assert verdict().reasons == ()


@pytest.mark.parametrize(
    ("case", "doubt"),
    [
        ({"not_run": {"prefill": "not chosen"}}, "not run: prefill"),
        ({"complete": False}, "--quick"),
        ({"names": ONE_EACH[:-1]}, "inside"),
        ({"roles": (EDITED, UNEDITED)}, "--reference"),
        ({"roles": (EDITED, REFERENCE)}, "no unedited model"),
        ({"n": 50, "changes": {"plain": {UNEDITED: 0}}}, "nothing to recover"),
        ({"changes": {"prefill": {EDITED: 8, REFERENCE: 4}}}, "too few facts"),
        ({"others": {}}, "was not measured"),
        (
            {
                "membership": {
                    EDITED: AttackResult(figures={"auc": {"loss": 0.9}}),
                    REFERENCE: AttackResult(figures={"auc": {"loss": 0.5}}),
                }
            },
            "membership",
        ),
    ],
)
def test_what_is_missing_forbids_removed(case: dict[str, object], doubt: str) -> None:
    given = verdict(**case)  # type: ignore[arg-type]
    assert given.text.startswith("suppressed (not shown to be removed: ")
    assert doubt in given.text


def test_traces_forbid_removed_and_are_no_recovery() -> None:
    names = (*ONE_EACH, "patching-depth")
    given = verdict({"patching-depth": {EDITED: 40, REFERENCE: 0}}, names=names)
    assert given.text.startswith("suppressed (not shown to be removed: ")
    assert "traces of the answers are left inside by patching-depth (0.67)" in given.text
    assert "recoverable by" not in given.text
    assert "too few facts to rule out traces" in verdict({"patching-depth": {EDITED: 12}}, names=names).text
    # A second model that never knew need not come out at zero.
    assert verdict({"patching-depth": {EDITED: 4}}, names=names).text.startswith("removed:")


def test_many_unclear_attacks_are_counted() -> None:
    few = {name: {EDITED: 4} for name in ("prefill", "spellings")}
    assert "by prefill (up to" in verdict(few).text
    many = verdict({name: {EDITED: 4} for name in ONE_EACH if name != "plain"}).text
    assert f"by {len(ONE_EACH) - 1} attacks (up to" in many


def test_an_attack_that_recovers_is_named() -> None:
    text = verdict({"quantise": {EDITED: 12}}).text
    assert text.startswith("suppressed: ")
    assert "quantise (12 of 60, unedited 50 of 60, reference 0 of 60)" in text


def test_a_recovery_wins_over_what_was_not_run() -> None:
    assert verdict({"quantise": {EDITED: 12}}, not_run={"prune": "not chosen"}).text.startswith("suppressed: ")


@pytest.mark.parametrize(("hits", "word"), [(30, "not forgotten"), (8, "removed"), (11, "not forgotten")])
def test_plain_questions_still_answered(hits: int, word: str) -> None:
    """The unedited model answers 50 beyond a floor of none: more than a fifth of that is not forgotten."""
    control = hits if word == "removed" else 0
    # As many as a model that never knew is no knowledge.
    given = verdict({"plain": {EDITED: hits, REFERENCE: control}}, names=ONE_EACH, n=600 if word == "removed" else N)
    assert given.text.startswith(word)


def test_few_plain_answers_are_suppression() -> None:
    assert verdict({"plain": {EDITED: 7}, "prefill": {EDITED: 20}}).text.startswith("suppressed")


def test_damage_comes_first() -> None:
    broken = collateral(level=15.0)
    assert verdict({"plain": {EDITED: 40}}, others=broken).text.startswith("model damaged: perplexity")
    assert verdict(others=collateral(kept=(1.0,) * 20 + (0.0,) * 20)).text.startswith("model damaged: kept facts")


def test_damage_within_the_interval_is_none() -> None:
    """37 of 40 kept: 0.925, and the interval reaches below the limit, but not all of it lies there."""
    assert not any(each.beyond for each in find_damage(collateral(kept=(1.0,) * 35 + (0.0,) * 5)))
    assert any(each.beyond for each in find_damage(collateral(kept=(1.0,) * 30 + (0.0,) * 10)))


def test_a_perplexity_that_is_not_finite_is_damage() -> None:
    assert verdict(others=collateral(level=float("inf"))).text.startswith("model damaged")
    results = collateral()
    results["ordinary-text"][EDITED] = AttackResult(series={"perplexity": [None] * 8})
    assert verdict(others=results).text.startswith("model damaged")


def test_guessable_attacks_are_not_judged_without_a_reference() -> None:
    lens = found("logit-lens", {EDITED: 30, UNEDITED: 50})
    assert lens.status == "not judged"
    assert found("logit-lens", {EDITED: 30, UNEDITED: 50, REFERENCE: 0}).status == "recovers"
    assert found("logit-lens", {EDITED: 30, UNEDITED: 50, REFERENCE: 30}).status == "unclear"


def test_chance_is_the_control_without_a_reference() -> None:
    values = (1.0,) * 30 + (0.0,) * 30
    chancy = AttackResult((Measure("only", values, ((0.5,) * N,)),))
    finding = compare(BY_NAME["prefill"], {EDITED: chancy})
    assert finding is not None
    assert (finding.control, finding.chance, finding.excess) == ("chance", 0.5, 0.0)
    assert finding.status == "unclear"


def test_one_hit_among_few_may_be_luck() -> None:
    """Chance is an estimate too: none of 60 pairs leaves room for one of 12 facts, but not for three."""
    zeros = ((0.0,) * 12,) * 5
    for hits, status in [(1, "unclear"), (3, "recovers")]:
        values: tuple[Value, ...] = (1.0,) * hits + (0.0,) * (12 - hits)
        finding = compare(BY_NAME["prefill"], {EDITED: AttackResult((Measure("only", values, zeros),))})
        assert finding is not None
        assert finding.status == status


def test_best_of_variants_counts_for_chance_too() -> None:
    measures = (
        Measure("a", (1.0, 0.0, None), ((0.0, 1.0, None),)),
        Measure("b", (0.0, 0.0, None), ((1.0, 0.0, None),)),
    )
    both = AttackResult(measures)
    assert both.values == (1.0, 0.0, None)
    assert both.others == ((1.0, 1.0, None),)


def test_every_group_has_an_attack_and_every_attack_a_group() -> None:
    assert {attack.group for attack in ATTACKS} == set(GROUPS)
    assert len(BY_NAME) == len(ATTACKS)
