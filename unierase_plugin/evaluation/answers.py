"""How long a judged answer may be, and when it gives a fact.

Runs, finetuning, audits and comparisons take both from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from .metrics import answered


@dataclass(frozen=True)
class AnswerLength:
    """The length of a generated answer in tokens: that of the longest true answer and some more, within bounds."""

    #: Tokens beyond the longest true answer.
    more: int
    least: int
    most: int

    def tokens(self, true_answers: Iterable[int]) -> int:
        """Returns the number of tokens to generate. true_answers: lengths of the true answers in tokens."""
        return min(max(max(true_answers, default=0) + self.more, self.least), self.most)


#: Answers before and after a run (report.json).
OF_RUNS = AnswerLength(more=8, least=32, most=128)
#: Answers after a training by `unierase finetune`.
OF_FINETUNING = AnswerLength(more=8, least=0, most=128)
#: Answers in a comparison. TOFU generates 200 tokens.
OF_COMPARISONS = AnswerLength(more=8, least=32, most=200)
#: Answers to an audit's questions, by its sizes.
OF_QUICK_AUDITS = AnswerLength(more=8, least=20, most=40)
OF_FULL_AUDITS = AnswerLength(more=8, least=32, most=128)


class Told(Protocol):
    """Anything with a question and its true answer."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...


def gives_answer(fact: Told, said: str) -> bool:
    """Whether a text gives the answer of a fact, by the rule of `metrics.answered`."""
    return answered(fact.answer, said, fact.question)
