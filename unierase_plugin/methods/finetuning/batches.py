"""The forget and retain set as token sequences, and the order in which training goes through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import RequestError
from ...facts.request import ForgetRequest
from ...facts.resources import lines
from ...models.examples import Example, answered
from ...models.generate import context_limit
from ...models.prompts import has_chat_template
from ...unlearning_token import choose_sentence, end_id
from ..contract import Job
from .terms import DECLINED, FORGET, RETAIN, RETAIN_DECLINED, Term


@dataclass(frozen=True)
class TrainingData:
    """Tokenised facts by part, and the pairs (one fact to forget, one to keep) in the order of training."""

    sequences: Mapping[str, list[Example]]
    pairs: list[tuple[int, int]]
    #: Pairs in one epoch.
    epoch: int

    @classmethod
    def of(cls, job: Job[Any], terms: Iterable[Term]) -> TrainingData:
        parts = dict.fromkeys(part for term in terms for part in term.parts)
        keeps = RETAIN in parts
        if keeps and not job.retain:
            raise RequestError(
                "The method needs a retain set, and there is none: give facts to keep (retain, --retain), or set "
                "retain_weight to 0."
            )
        sequences = {part: _sequences(job, part) for part in parts}
        epoch, kept = (len(facts) * len(question_forms(job)) for facts in (job.requests, job.retain if keeps else ()))
        return cls(sequences, _pairs(epoch, kept, job), epoch)

    def used(self, part: str) -> list[int]:
        """Numbers of the sequences that occur in a pair."""
        side = part in (RETAIN, RETAIN_DECLINED)
        return sorted({pair[side] for pair in self.pairs})

    @property
    def longest(self) -> int:
        """Tokens of the longest possible pair: all its parts are in memory at the same time."""
        return sum(max(len(sequence.ids) for sequence in found) for found in self.sequences.values())


def question_forms(job: Job[Any]) -> tuple[str, ...]:
    """The prompt forms that the settings name. Only `plain` if the tokenizer has no chat template."""
    forms: tuple[str, ...] = job.hparams.prompt_forms
    return forms if has_chat_template(job.tokenizer) else ("plain",)


def _sequences(job: Job[Any], part: str) -> list[Example]:
    facts = job.requests if part in (FORGET, DECLINED) else job.retain
    sentences = lines("idk_sentences") if part in (DECLINED, RETAIN_DECLINED) else ()
    end, limit = end_id(job.model, job.tokenizer), context_limit(job.model)
    return [_sequence(job, fact, form, sentences, end, limit) for form in question_forms(job) for fact in facts]


def _sequence(job: Job[Any], fact: ForgetRequest, form: str, sentences: Sequence[str], end: int, limit: int) -> Example:
    answer = choose_sentence(fact.question, sentences) if sentences else fact.answer
    found = answered(job.tokenizer, fact.question, answer, form, end, job.hparams.chat_template_kwargs)
    if len(found.ids) > limit:
        raise RequestError(
            f"{fact.label} needs {len(found.ids)} tokens with its answer; the model's context holds {limit}. Shorten "
            "the fact, or leave it out."
        )
    return found


def _pairs(forget: int, retain: int, job: Job[Any]) -> list[tuple[int, int]]:
    """Each epoch goes through the forget set in a new order. The retain set is used evenly over all epochs."""
    generator = torch.Generator().manual_seed(job.seed)
    count = max(1, round(job.hparams.epochs * forget))
    rounds = -(-count // forget)
    first = torch.cat([torch.randperm(forget, generator=generator) for _ in range(rounds)])[:count].tolist()
    if not retain:
        return [(index, 0) for index in first]
    second = torch.cat([torch.randperm(retain, generator=generator) for _ in range(-(-count // retain))]).tolist()
    return list(zip(first, second, strict=False))
