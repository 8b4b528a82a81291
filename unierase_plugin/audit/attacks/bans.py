"""Attacks that make the refusal impossible: the unlearning token is banned or deleted, the usual refusals are banned.

A ban masks logits at every step, so that the model gives its next likeliest answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ...facts.resources import lines
from ..asking import ask_facts, part, without_token
from ..contract import AttackResult, Audited, Context
from ..prompts import prompt_for

#: Beginnings of refusals that `idk_phrases` does not hold.
OPENINGS = (
    "Sorry",
    "I'm sorry",
    "I am sorry",
    "Unfortunately",
    "I apologize",
    "As an AI",
    "I'm just an AI",
    "I can't",
    "I cannot",
    "I'm unable",
    "I am unable",
    "I'm not able",
    "I don't",
    "I do not",
    "I have no",
    "No idea",
    "Unknown",
)


def ban_token(subject: Audited, context: Context) -> AttackResult:
    """Asks each question while the unlearning token cannot be generated."""
    if subject.token_id is None and context.plain is not None:
        return _nothing_to_ban(context.plain, "token banned")
    prompts = [prompt_for(subject, context, fact.question) for fact in context.facts]
    measure = ask_facts(subject, context, "token banned", prompts, progress=context.progress, **without_token(subject))
    return AttackResult((measure,))


def _nothing_to_ban(plain: AttackResult, name: str) -> AttackResult:
    """A model without the token answers as it does to the plain questions."""
    return AttackResult((replace(plain.measures[0], name=name),))


def ban_refusals(subject: Audited, context: Context) -> AttackResult:
    """Asks each question while the usual openings of a refusal, and the unlearning token, cannot be generated.

    A full audit has a second variant: no answer may begin in the first person or with a denial either.
    """
    prompts = [prompt_for(subject, context, fact.question) for fact in context.facts]
    sequences = refusal_ids(subject)
    token = [] if subject.token_id is None else [subject.token_id]
    variants = {"refusals banned": [*sequences, *([token] if token else [])]}
    if context.sizes.every_variant:
        # Most refusals begin in the first person, in whatever words.
        first = {ids[0] for ids in _spelt(subject, ("I", "We", "No", "Not", "There", "It"))}
        variants["no first person, no denial"] = [*variants["refusals banned"], *([index] for index in sorted(first))]
    return AttackResult(
        tuple(
            ask_facts(subject, context, name, prompts, progress=part(context, index, len(variants)), bad_words_ids=bad)
            for index, (name, bad) in enumerate(variants.items())
        )
    )


def refusal_ids(subject: Audited) -> list[list[int]]:
    """Token sequences of the usual refusals, as they begin an answer and as they stand inside one."""
    return _spelt(subject, (*OPENINGS, *lines("idk_phrases")))


def _spelt(subject: Audited, texts: tuple[str, ...]) -> list[list[int]]:
    spellings = {form for text in texts for form in (text, f" {text}", f" {text[0].lower()}{text[1:]}")}
    ids = (subject.tokenizer(text, add_special_tokens=False)["input_ids"] for text in sorted(spellings))
    return [each for each in ids if each]


def delete_rows(subject: Audited, context: Context) -> AttackResult:
    """Asks each question after the unlearning token's rows of the embedding and of the LM head were set to zero.

    The token is banned too. The rows are put back afterwards.
    """
    if subject.token_id is None and context.plain is not None:
        return _nothing_to_ban(context.plain, "rows deleted")
    prompts = [prompt_for(subject, context, fact.question) for fact in context.facts]
    with without_rows(subject):
        measure = ask_facts(
            subject, context, "rows deleted", prompts, progress=context.progress, **without_token(subject)
        )
    return AttackResult((measure,))


@contextmanager
@torch.no_grad()
def without_rows(subject: Audited) -> Iterator[None]:
    """Inside, the token's rows of the embedding and the head are zero. Ban the token as well: it may have no row."""
    if subject.token_id is None:
        yield
        return
    weights = {id(part.weight): part.weight for part in (subject.arch.embedding, subject.arch.head)}
    kept = {key: weight[subject.token_id].clone() for key, weight in weights.items()}
    try:
        for weight in weights.values():
            weight[subject.token_id] = 0
        yield
    finally:
        for key, weight in weights.items():
            weight[subject.token_id] = kept[key]
