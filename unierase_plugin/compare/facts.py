"""The facts of a comparison, and their division into validation and report."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..facts.readers import Requests, read_requests
from ..facts.request import ForgetRequest, check_requests, one_spelling, tell_unread
from ..facts.subjects import find_subject
from ..plugins.registration import registry

#: A fact of `facts.json`: question, answer, subject, `paraphrased_answer` and `perturbed_answer`.
Record = dict[str, Any]


def read_facts(spec: Requests, *, first: bool = False) -> tuple[ForgetRequest, ...]:
    """Reads the facts that a spec names, with wrong answers, and with subjects if they can be found.

    first: if several facts have one question, take the first; otherwise they are refused. It is for facts to keep,
    since TOFU's retain sets have such facts.
    """
    read = read_requests(spec, registry().readers, extras=True)
    if first:
        unique: dict[str, ForgetRequest] = {}
        for fact in read:
            unique.setdefault(one_spelling(fact.question), fact)
        read = tuple(unique.values())
    else:
        tell_unread(read)
    facts = check_requests(read)
    return tuple(replace(fact, subject=fact.subject or find_subject(fact.question)) for fact in facts)


def records(facts: Sequence[ForgetRequest]) -> list[Record]:
    """The facts as `facts.json` holds them.

    Wrong answers are left out unless every fact has some, since the truth ratio of a part would not be that of the set.
    """
    complete = all(fact.wrong_answers for fact in facts)
    return [
        {
            "question": fact.question,
            "answer": fact.answer,
            "subject": fact.subject,
            "paraphrased_answer": (fact.paraphrased_answer if complete else None) or fact.answer,
            "perturbed_answer": list(fact.wrong_answers) if complete else [],
        }
        for fact in facts
    ]


def divide(facts: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Divides the facts by a seeded draw into (validation, rest). A single fact is in both."""
    if len(facts) < 2 or share <= 0:
        return list(facts), list(facts)
    count = min(max(1, round(share * len(facts))), len(facts) - 1)
    chosen = set(random.Random(seed).sample(range(len(facts)), count))
    parts: tuple[list[Record], list[Record]] = ([], [])
    for index, fact in enumerate(facts):
        parts[index not in chosen].append(fact)
    return parts


def at_most(facts: Iterable[Record], most: int, seed: int) -> list[Record]:
    """Draws at most `most` of the facts, in their order; all if it is 0."""
    everything = list(facts)
    if not most or most >= len(everything):
        return everything
    return [everything[index] for index in sorted(random.Random(seed).sample(range(len(everything)), most))]


def parts_of(facts: Sequence[Record], count: int) -> list[list[Record]]:
    """Divides the facts into so many consecutive parts of nearly equal size, or fewer if there are fewer facts."""
    count = max(1, min(count, len(facts)))
    bounds = [round(at * len(facts) / count) for at in range(count + 1)]
    return [list(facts[start:stop]) for start, stop in itertools.pairwise(bounds)]
