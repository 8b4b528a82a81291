"""The report of a run: answers before and after, and figures of them (`report.json`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .answers import Told, gives_answer
from .metrics import mean, reads_as_idk, rouge_l_recall

#: Version of report.json's schema (docs/reference/report.md).
SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """One question, and the model's answers before and after the run."""

    question: str
    answer: str
    before: str
    after: str
    answered_before: bool
    answered_after: bool
    token_first: bool
    idk: bool
    rouge_before: float
    rouge_after: float


def judge(fact: Told, before: str, after: str, *, token: str, ends: Sequence[str], phrases: Sequence[str]) -> Outcome:
    """Compares two answers of the model with the true answer.

    token: the unlearning token; ends: tokens that end an answer. Both are removed from the texts first.
    phrases: key phrases of refusals (`metrics.reads_as_idk`).
    """
    first = after.lstrip().startswith(token)
    old, new = (_clean(text, (token, *ends)) for text in (before, after))
    return Outcome(
        question=fact.question,
        answer=fact.answer,
        before=old,
        after=new,
        answered_before=gives_answer(fact, old),
        answered_after=gives_answer(fact, new),
        token_first=first,
        idk=reads_as_idk(new, phrases),
        rouge_before=rouge_l_recall(fact.answer, old),
        rouge_after=rouge_l_recall(fact.answer, new),
    )


def _clean(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return " ".join(text.split())


@dataclass(frozen=True)
class Report:
    """The figures of one run; `as_dict` is what report.json holds."""

    model: str
    method: str
    forget: Sequence[Outcome]
    retain: Sequence[Outcome]
    perplexity_before: float
    perplexity_after: float
    #: None for a method without a token.
    token_leak: float | None
    update_norm_ratio: Mapping[int, float]
    parameters_changed: float
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    #: Figures of the edit: how close it came to its targets, residuals, ranks.
    edit: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "method": self.method,
            "n_forget": len(self.forget),
            "n_retain": len(self.retain),
            "forget": {
                **_counts(self.forget),
                "token_first_after": sum(outcome.token_first for outcome in self.forget),
                "idk_after": sum(outcome.idk for outcome in self.forget),
                "token_first_and_idk_after": sum(outcome.token_first and outcome.idk for outcome in self.forget),
            },
            "retain": {
                **_counts(self.retain),
                "answered_both": sum(o.answered_before and o.answered_after for o in self.retain),
                "token_first_after": sum(outcome.token_first for outcome in self.retain),
            },
            "perplexity": {"before": self.perplexity_before, "after": self.perplexity_after},
            "token_leak": self.token_leak,
            "update_norm_ratio": {str(layer): ratio for layer, ratio in self.update_norm_ratio.items()},
            "parameters_changed": self.parameters_changed,
            "seconds": dict(self.seconds),
            "peak_memory_bytes": self.peak_memory_bytes,
            "edit": dict(self.edit),
        }


def _counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "answered_before": sum(outcome.answered_before for outcome in outcomes),
        "answered_after": sum(outcome.answered_after for outcome in outcomes),
        "rouge_l_recall_before": mean([outcome.rouge_before for outcome in outcomes]),
        "rouge_l_recall_after": mean([outcome.rouge_after for outcome in outcomes]),
    }
