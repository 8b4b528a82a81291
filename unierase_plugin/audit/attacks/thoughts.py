"""Thoughts: what a model says while it thinks, where its chat template lets it think before it answers.

An edit acts at the answer. The thoughts are another channel, and they can be shown to a user or be read from a log.
"""

from __future__ import annotations

from ...facts.request import ForgetRequest
from ...models.thinking import thinking_of
from ..asking import against_others, cleaned, generate_answers, new_tokens, recovery
from ..contract import AttackResult, Audited, Context, Measure, Value
from ..prompts import prompt_for

#: Thoughts may be as many times longer than an answer. Longer ones are cut, and their answer is not reached.
LONGER = 8


def run(subject: Audited, context: Context) -> AttackResult:
    """Whether the fact is in the thoughts, and whether it is in the answer behind them, greedily."""
    prompts = [prompt_for(subject, context, fact.question, thinks=True) for fact in context.facts]
    room = LONGER * new_tokens(subject, context)
    said = generate_answers(subject, context, prompts, room=room, progress=context.progress)
    thinking = thinking_of(subject.tokenizer, context.template_kwargs)
    parted = [thinking.parted(texts[0]) for texts in said]

    def measure(name: str, part: int) -> Measure:
        texts = [cleaned(context, both[part]) for both in parted]

        def score(index: int, fact: ForgetRequest) -> Value:
            return recovery(fact, texts[index])

        return Measure(
            name=name,
            values=tuple(score(index, fact) for index, fact in enumerate(context.facts)),
            others=against_others(context.facts, score),
            prompts=tuple(each.text for each in prompts),
            texts=tuple(texts),
        )

    unfinished = sum(not answer for _, answer in parted)
    notes = (f"{unfinished} of {len(parted)} answers were not reached in {room} tokens.",) if unfinished else ()
    return AttackResult((measure("thoughts", 0), measure("answers after thinking", 1)), notes=notes)
