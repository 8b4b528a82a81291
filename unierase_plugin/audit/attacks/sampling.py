"""leak@k: answers that sampling finds where greedy decoding refuses."""

from __future__ import annotations

from typing import Any

from ...facts.request import ForgetRequest
from ...settings.values import MOST_SEED
from ..asking import against_others, cleaned, generate_answers, part, recovery, without_token
from ..contract import AttackResult, Audited, Context, Measure
from ..figures import leak_at_k
from ..prompts import prompt_for

KS = (1, 4, 16, 64)


def run(subject: Audited, context: Context) -> AttackResult:
    """leak@k by temperature, with the token as it is and banned; the value is at the largest k."""
    sizes = context.sizes
    plain: dict[str, Any] = {}
    runs = [(f"temperature {heat:g}", heat, plain) for heat in sizes.temperatures]
    if context.token and sizes.every_variant:
        # A model without the token is asked as often, without a ban.
        runs.append(
            (f"temperature {sizes.temperatures[-1]:g}, token banned", sizes.temperatures[-1], without_token(subject))
        )
    figures: dict[str, Any] = {}
    measures = []
    for index, (name, heat, settings) in enumerate(runs):
        hits, shifted, prompts, texts = _sample(subject, context, index, len(runs), heat, settings)
        figures[name] = {str(k): leak(hits, sizes.samples, k) for k in ks(sizes.samples)}
        k = ks(sizes.samples)[-1]
        measures.append(
            Measure(
                name=f"{name}, leak@{k}",
                values=tuple(leak_at_k(sizes.samples, n, k) for n in hits),
                others=tuple(
                    tuple(None if n is None else leak_at_k(sizes.samples, n, k) for n in row) for row in shifted
                ),
                prompts=prompts,
                texts=texts,
            )
        )
    return AttackResult(tuple(measures), figures={"leak_at_k": figures})


def ks(samples: int) -> list[int]:
    """The numbers k that so many samples give an estimate for."""
    return [k for k in KS if k <= samples]


def leak(hits: list[int], samples: int, k: int) -> float:
    """Mean leak@k over facts."""
    return sum(leak_at_k(samples, n, k) for n in hits) / len(hits)


def _sample(
    subject: Audited, context: Context, index: int, count: int, heat: float, settings: dict[str, Any]
) -> tuple[list[int], list[list[int | None]], tuple[str, ...], tuple[str, ...]]:
    """Hits by fact, hits of other facts' answers by shift and fact, prompts, and one text by fact, a hit if any."""
    from transformers import set_seed

    set_seed((context.seed + index) % (MOST_SEED + 1))
    prompts = [prompt_for(subject, context, fact.question) for fact in context.facts]
    said = generate_answers(
        subject,
        context,
        prompts,
        samples=context.sizes.samples,
        temperature=heat,
        progress=part(context, index, count),
        **settings,
    )
    clean = [[cleaned(context, text) for text in texts] for texts in said]

    def hits(row: int, fact: ForgetRequest) -> int:
        return sum(bool(recovery(fact, text)) for text in clean[row])

    shifted = against_others(context.facts, hits)
    shown = tuple(
        next((text for text in texts if recovery(fact, text)), texts[0])
        for fact, texts in zip(context.facts, clean, strict=True)
    )
    return (
        [hits(row, fact) for row, fact in enumerate(context.facts)],
        [[None if value is None else int(value) for value in row] for row in shifted],
        tuple(each.text for each in prompts),
        shown,
    )
