"""What audit.json holds: the verdict, what each attack found, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..facts.request import ForgetRequest
from ..models.memory import peak_memory_bytes
from ..plugins.hookspecs import AnswerMetric
from .asking import cleaned
from .attacking import AuditState
from .attacks import in_order
from .contract import EDITED, GROUPS, PLAIN, REFERENCE, UNEDITED, Attack, AttackResult, Context, Measure
from .facts import judgeable
from .kept_results import SCHEMA
from .sources import Sources
from .verdict import Finding, compare, find_damage, judge

#: Examples of each attack that the page shows.
EXAMPLES = 4


def make_report(
    state: AuditState,
    sources: Sources,
    facts: Sequence[ForgetRequest],
    kept: Sequence[ForgetRequest],
    metrics: Sequence[AnswerMetric] = (),
) -> dict[str, Any]:
    """The report of a finished audit. facts, kept: all facts that were read; a sample of them was audited.

    metrics: registered metrics of the answers to the plain questions. No verdict depends on them.
    """
    context = state.context
    by_attack = {
        attack.name: {role: found[attack.name] for role, found in state.results.items() if attack.name in found}
        for attack in state.attacks
    }
    state.not_run.update(
        (name, result.unfit) for name, by_role in by_attack.items() for result in by_role.values() if result.unfit
    )
    found = {attack.name: compare(attack, by_attack[attack.name]) for attack in state.attacks}
    findings = [finding for finding in found.values() if finding is not None]
    damage = find_damage(by_attack)
    verdict = judge(
        findings,
        damage,
        state.not_run,
        complete=context.sizes.every_variant and len(facts) <= context.sizes.facts,
        membership=by_attack.get("membership"),
    )
    return {
        "schema": SCHEMA,
        "verdict": verdict.text,
        "doubts": list(verdict.reasons),
        "not_run": [
            {"attack": attack.name, "group": attack.group, "why": state.not_run[attack.name]}
            for attack in in_order(state.known)
            if attack.name in state.not_run
        ],
        "does_not_apply": [{"attack": name, "why": why} for name, why in state.inapplicable.items()],
        "model": sources.name(EDITED),
        "unedited": f"{sources.name(UNEDITED)} ({sources.how})" if sources.rebuilt is None else sources.how,
        "reference": sources.name(REFERENCE) if sources.reference is not None else None,
        "method": sources.record.manifest["method"] if sources.record else None,
        "token": context.token or None,
        "form": context.form,
        "n_forget": len(facts),
        "n_echo": len(facts) - len(judgeable(facts)),
        "n_audited": len(context.facts),
        "n_kept": len(kept),
        "n_kept_audited": len(context.kept),
        "sizes": asdict(context.sizes),
        "seed": context.seed,
        "groups": dict(GROUPS),
        "attacks": [
            _entry(attack, found[attack.name], by_attack[attack.name], context, metrics if attack.name == PLAIN else ())
            for attack in state.attacks
            if by_attack[attack.name]
        ],
        "damage": [asdict(each) for each in damage],
        "seconds": state.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _entry(
    attack: Attack,
    finding: Finding | None,
    results: Mapping[str, AttackResult],
    context: Context,
    metrics: Sequence[AnswerMetric],
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": attack.name, "group": attack.group, "asks": attack.asks, "cost": attack.cost}
    if finding is not None:
        entry |= {
            "status": finding.status,
            "control": finding.control,
            "chance": finding.chance,
            "excess": finding.excess,
            "excess_interval": list(finding.excess_interval),
            "shares": {role: asdict(share) for role, share in finding.shares.items()},
        }
    figures = {role: {**found.figures, **_measured(found, context, metrics)} for role, found in results.items()}
    return entry | {
        "variants": {role: [_variant(measure) for measure in found.measures] for role, found in results.items()},
        "figures": {role: each for role, each in figures.items() if each},
        "notes": sorted({note for found in results.values() for note in found.notes}),
        "seconds": {role: found.seconds for role, found in results.items()},
        "examples": _examples(results, context),
    }


def _measured(result: AttackResult, context: Context, metrics: Sequence[AnswerMetric]) -> dict[str, dict[str, float]]:
    """The mean of each metric over the answers of one model."""
    # A measure without texts generated nothing.
    pairs = [
        (fact, cleaned(context, text))
        for measure in result.measures
        if measure.texts
        for fact, text in zip(context.facts, measure.texts, strict=True)
    ]
    if not pairs or not metrics:
        return {}
    return {
        "metrics": {
            metric.name: sum(float(metric(fact.answer, said, fact.question)) for fact, said in pairs) / len(pairs)
            for metric in metrics
        }
    }


def _variant(measure: Measure) -> dict[str, Any]:
    known = [value for value in measure.values if value is not None]
    return {
        "name": measure.name,
        "n": len(known),
        "mean": sum(known) / len(known) if known else None,
        "values": list(measure.values),
        "curve": list(measure.curve) if measure.curve else None,
    }


def _examples(results: Mapping[str, AttackResult], context: Context) -> list[dict[str, Any]]:
    """Prompts and outputs, those facts first that the attack recovered from the edited model."""
    if EDITED not in results:
        return []
    pairs = [
        (measure, index)
        for measure in results[EDITED].measures
        for index in range(len(measure.texts))
        if measure.values[index] is not None
    ]
    best: dict[int, tuple[Measure, int]] = {}
    for measure, index in sorted(pairs, key=lambda pair: -(pair[0].values[pair[1]] or 0.0)):
        best.setdefault(index, (measure, index))
    return [
        {
            "variant": measure.name,
            "prompt": measure.prompts[index],
            "answer": context.facts[index].answer,
            "recovered": measure.values[index],
            "said": {role: _said(found, measure.name, index) for role, found in results.items()},
        }
        for measure, index in list(best.values())[:EXAMPLES]
    ]


def _said(result: AttackResult, variant: str, index: int) -> str | None:
    """The output of the same variant on another model."""
    return next((each.texts[index] for each in result.measures if each.name == variant and each.texts), None)
