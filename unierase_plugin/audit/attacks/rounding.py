"""Weights rounded to few bits, and pruned: an edit that is smaller than the rounding may be lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ...facts.resources import paragraphs
from ...models.generate import perplexity
from ...models.weights import restored
from ..asking import ask_facts, part
from ..contract import AttackResult, Audited, Context
from ..prompts import prompt_for
from ..weights import change_each_expert, change_inputs_last, expert_weights, linear_maps, pruned, rounded

Change = Callable[[Tensor], Tensor]


def quantise(subject: Audited, context: Context) -> AttackResult:
    """Asks each question after all linear maps were rounded to few bits.

    `figures["perplexity"]` has the perplexity on ordinary text by variant. It tells a lost edit from a broken model.
    """
    variants: dict[str, Change] = {"int4, groups of 128": lambda weight: rounded(weight, 4, 128)}
    if context.sizes.every_variant:
        variants |= {
            "int8, by row": lambda weight: rounded(weight, 8),
            "int4, groups of 32": lambda weight: rounded(weight, 4, 32),
            "int3, groups of 32": lambda weight: rounded(weight, 3, 32),
        }
    return _changed(subject, context, variants)


def prune(subject: Audited, context: Context) -> AttackResult:
    """Asks each question after the smallest weights of every linear map were set to zero.

    `figures["perplexity"]` has the perplexity on ordinary text by variant. It tells a lost edit from a broken model.
    """
    shares = (0.1, 0.3, 0.5) if context.sizes.every_variant else (0.3,)
    return _changed(subject, context, {f"{share:.0%} pruned": _pruning(share) for share in shares})


def _pruning(share: float) -> Change:
    return lambda weight: pruned(weight, share)


def _changed(subject: Audited, context: Context, variants: Mapping[str, Change]) -> AttackResult:
    modules, stacked = [module for _, module in linear_maps(subject.arch)], expert_weights(subject.arch)
    prompts = [prompt_for(subject, context, fact.question) for fact in context.facts]
    texts = paragraphs("ordinary_text")[: context.sizes.texts]
    measures, levels = [], {}
    for index, (name, change) in enumerate(variants.items()):
        with restored([*(module.weight for module in modules), *(weight for weight, _ in stacked)]):
            for module in modules:
                change_inputs_last(module, change)
            for weight, input_first in stacked:
                change_each_expert(weight, input_first, change)
            # A model that the rounding broke says nothing about the edit.
            levels[name] = perplexity(subject.model, subject.tokenizer, texts)
            measures.append(ask_facts(subject, context, name, prompts, progress=part(context, index, len(variants))))
    return AttackResult(tuple(measures), figures={"perplexity": levels})
