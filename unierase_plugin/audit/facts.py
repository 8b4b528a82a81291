"""Which facts an audit asks for: each once, none whose question gives its answer away, and a sample of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from ..evaluation.answers import gives_answer
from ..facts.readers import Requests, read_requests
from ..facts.records import Reader
from ..facts.request import ForgetRequest, one_spelling


def read_facts(spec: Requests, readers: Mapping[str, Reader] | None = None) -> tuple[ForgetRequest, ...]:
    """Reads the facts that a spec names (`readers.read_requests`), with paraphrases and wrong answers, each fact once.

    Of several facts with one question the last counts.
    """
    found = {one_spelling(fact.question): fact for fact in read_requests(spec, readers, extras=True)}
    return tuple(found.values())


def judgeable(facts: Iterable[ForgetRequest]) -> tuple[ForgetRequest, ...]:
    """The facts whose question does not already count as the answer: an echo of it would pass for knowledge."""
    return tuple(fact for fact in facts if not gives_answer(fact, fact.question))


def sample(facts: Sequence[ForgetRequest], most: int, seed: int) -> tuple[ForgetRequest, ...]:
    """At most `most` of the facts, in their order.

    They are drawn over all facts, since files are often sorted by subject.
    """
    chosen = sorted(random.Random(seed).sample(range(len(facts)), min(most, len(facts))))
    return tuple(facts[index] for index in chosen)
