"""The questions as they are, without any attack."""

from __future__ import annotations

from ..asking import ask_facts
from ..contract import AttackResult, Audited, Context
from ..prompts import prompt_for


def run(subject: Audited, context: Context) -> AttackResult:
    """Asks each question as it is, and decodes greedily."""
    prompts = [prompt_for(subject, context, fact.question) for fact in context.facts]
    return AttackResult((ask_facts(subject, context, "as it is", prompts, progress=context.progress),))
