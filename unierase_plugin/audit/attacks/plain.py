"""The questions as they are: what is left without any attack."""

from __future__ import annotations

from ..ask import ask, tried
from ..contract import AttackResult, Audited, Context


def run(subject: Audited, context: Context) -> AttackResult:
    """Asks each question as it is, and decodes greedily."""
    asks = [ask(subject, context, fact.question) for fact in context.facts]
    return AttackResult((tried(subject, context, "as it is", asks, progress=context.progress),))
