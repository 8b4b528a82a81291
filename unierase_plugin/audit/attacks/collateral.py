"""What else the edit changed: kept facts, needless refusals, the token in ordinary text, questions in pairs."""

from __future__ import annotations

from typing import Any

import torch

from ...evaluation.metrics import is_fluent, reads_as_idk
from ...facts.resources import lines, paragraphs
from ...models.generate import context_limit, pad_token_id, perplexity, tokens_for_logits
from ...models.trace import pad, token_batches
from ..asking import ask_facts, cleaned, generate_answers, likeness, part, recovery
from ..contract import AttackResult, Audited, Context, Value
from ..prompts import prompt_for


def retention(subject: Audited, context: Context) -> AttackResult:
    """How many kept facts are answered or refused, and how many bundled questions are refused or answered fluently."""
    unrelated = lines("questions")[: context.sizes.unrelated]
    questions = [*(fact.question for fact in context.kept), *unrelated]
    prompts = [prompt_for(subject, context, question) for question in questions]
    said = [texts[0] for texts in generate_answers(subject, context, prompts, progress=context.progress)]
    refused = [float(is_refusal(context, text)) for text in said]
    plain = [cleaned(context, text) for text in said]
    count = len(context.kept)
    series: dict[str, list[Value]] = {
        "kept_answered": [recovery(fact, text) for fact, text in zip(context.kept, plain, strict=False)],
        "kept_refused": [*refused[:count]],
        "unrelated_refused": [*refused[count:]],
        "unrelated_fluent": [float(is_fluent(text)) for text in plain[count:]],
    }
    shown = [{"question": question, "said": text} for question, text in zip(questions, said, strict=True)]
    near = neighbours(context)
    figures: dict[str, Any] = {"examples": shown}
    if near:
        answered = [value or 0.0 for value in series["kept_answered"]]
        far = [value for index, value in enumerate(answered) if index not in near]
        figures["kept_facts_answered"] = {
            f"the {len(near)} most like the forgotten ones": sum(answered[index] for index in near) / len(near),
            f"the other {len(far)}": sum(far) / len(far),
        }
    return AttackResult(series=series, figures=figures)


def neighbours(context: Context) -> frozenset[int]:
    """The quarter of the kept facts whose questions are most like a forgotten one, by number; none of fewer than 4."""
    likest = [max(likeness(kept.question, fact.question) for fact in context.facts) for kept in context.kept]
    order = sorted(range(len(likest)), key=lambda index: -likest[index])
    return frozenset(order[: len(order) // 4])


def is_refusal(context: Context, text: str) -> bool:
    """Whether an answer begins with the token, or says that the answer is not known."""
    opened = bool(context.token) and text.lstrip().startswith(context.token)
    return opened or reads_as_idk(cleaned(context, text), lines("idk_phrases"))


def ordinary_text(subject: Audited, context: Context) -> AttackResult:
    """Perplexity of each bundled ordinary text, and how likely the unlearning token is inside these texts.

    The series `perplexity` has one value a text. Nothing is generated, so there are no measures.
    """
    texts = paragraphs("ordinary_text")[: context.sizes.texts]
    # Text by text, so that the ratio to another model has an interval.
    levels: list[Value] = []
    for index, text in enumerate(texts):
        levels.append(perplexity(subject.model, subject.tokenizer, [text]))
        part(context, index, len(texts) + 1)(1.0)
    figures = {} if subject.token_id is None else _token_in(subject, texts)
    context.progress(1.0)
    return AttackResult(series={"perplexity": levels}, figures=figures)


@torch.no_grad()
def _token_in(subject: Audited, texts: tuple[str, ...]) -> dict[str, float]:
    """The token's largest probability at any position of the texts, and the share of positions that it leads."""
    model, tokenizer = subject.model, subject.tokenizer
    rows = [tokenizer(text)["input_ids"][: context_limit(model)] for text in texts]
    worst, leads, count = 0.0, 0, 0
    for chosen in token_batches(rows, tokens_for_logits(model)):
        batch = pad([rows[i] for i in chosen], pad_token_id(model, tokenizer), "right", subject.arch.device)
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits.float()
        real = batch.mask.to(logits.device).bool()
        likely = (logits[..., subject.token_id] - logits.logsumexp(-1)).exp()[real]
        worst = max(worst, float(likely.max()))
        leads += int((logits.argmax(-1) == subject.token_id)[real].sum())
        count += int(real.sum())
    return {"token_probability_most": worst, "token_leads": leads / count}


def paired(subject: Audited, context: Context) -> AttackResult:
    """A forgotten and a kept question in one turn, the forgotten one first, then last."""
    pairs = [(fact, context.kept[index % len(context.kept)]) for index, fact in enumerate(context.facts)]
    orders = {"forgotten first": "{0} And {1}", "kept first": "{1} And {0}"}
    orders = orders if context.sizes.every_variant else {"kept first": orders["kept first"]}
    measures = []
    series: dict[str, list[Value]] = {}
    for index, (name, frame) in enumerate(orders.items()):
        prompts = [prompt_for(subject, context, frame.format(fact.question, kept.question)) for fact, kept in pairs]
        found = ask_facts(subject, context, name, prompts, progress=part(context, index, len(orders)))
        measures.append(found)
        series[f"kept_answered, {name}"] = [
            recovery(kept, cleaned(context, text)) for (_, kept), text in zip(pairs, found.texts, strict=True)
        ]
    return AttackResult(tuple(measures), series=series)
