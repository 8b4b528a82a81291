"""The facts of a comparison, with what the data holds beside them, and their parts for choosing and for reporting."""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UniEraseError
from ..facts.benchmarks import TOFU_SPLITS, tofu_records
from ..facts.files import FILE_SUFFIXES, iter_records
from ..facts.readers import Requests, read_requests
from ..facts.request import ForgetRequest, check_requests, one_spelling, tell_unread
from ..facts.subjects import find_subject
from ..plugins.registration import registry

logger = logging.getLogger(__name__)

#: Question, answer, subject and, where the data has them, `paraphrased_answer` and `perturbed_answer`.
Record = dict[str, Any]


def read_facts(spec: Requests, *, first: bool = False) -> list[Record]:
    """The facts that a spec names, each question once.

    first: of facts with one question the first is taken, for facts to keep: TOFU's have some. Else they are refused.
    Wrong answers are kept where every fact has some, since the truth ratio of a part would not be that of the set.
    """
    given = spec if isinstance(spec, (str, os.PathLike)) else list(spec)
    extras = {one_spelling(str(each.get("question"))): each for each in _records(given)}
    facts = []
    read = read_requests(given, registry().readers)
    if first:
        unique: dict[str, ForgetRequest] = {}
        for fact in read:
            unique.setdefault(one_spelling(fact.question), fact)
        read = tuple(unique.values())
    if not first:
        tell_unread(read)
    for fact in check_requests(read):
        extra = extras.get(one_spelling(fact.question), {})
        wrong = extra.get("perturbed_answer") or []
        facts.append(
            {
                "question": fact.question,
                "answer": fact.answer,
                "subject": fact.subject or find_subject(fact.question),
                "paraphrased_answer": extra.get("paraphrased_answer") or fact.answer,
                "perturbed_answer": [wrong] if isinstance(wrong, str) else list(wrong),
            }
        )
    if not all(fact["perturbed_answer"] for fact in facts):
        facts = [{**fact, "paraphrased_answer": fact["answer"], "perturbed_answer": []} for fact in facts]
    return facts


def _records(spec: Any) -> Iterator[Mapping[str, Any]]:
    """Records that may hold more than question and answer; none for the other benchmarks."""
    if not isinstance(spec, (str, os.PathLike)):
        return (each for each in spec if isinstance(each, Mapping))
    source = os.fspath(spec).strip().partition("[")[0]
    prefix, _, split = source.partition(":")
    if prefix == "tofu":
        return _tofu(
            "retain_perturbed" if split.startswith("retain") else f"{split.removesuffix('_perturbed')}_perturbed"
        )
    if source.lower().endswith(FILE_SUFFIXES) and Path(source).is_file():
        return (record for _, record in iter_records(source) if isinstance(record, Mapping))
    return iter(())


def _tofu(split: str) -> Iterator[Mapping[str, Any]]:
    if split not in TOFU_SPLITS:
        return iter(())
    try:
        return iter([record for _, record in tofu_records(split)])
    except UniEraseError as error:
        logger.warning("No truth ratio: TOFU's wrong answers cannot be read (%s).", error)
        return iter(())


def divide(facts: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(validation, rest) by a seeded draw; one fact alone is in both, as there is nothing to divide."""
    if len(facts) < 2 or share <= 0:
        return list(facts), list(facts)
    count = min(max(1, round(share * len(facts))), len(facts) - 1)
    chosen = set(random.Random(seed).sample(range(len(facts)), count))
    parts: tuple[list[Record], list[Record]] = ([], [])
    for index, fact in enumerate(facts):
        parts[index not in chosen].append(fact)
    return parts


def at_most(facts: Iterable[Record], most: int, seed: int) -> list[Record]:
    """So many facts drawn over all of them, in their order; all where `most` is 0."""
    everything = list(facts)
    if not most or most >= len(everything):
        return everything
    return [everything[index] for index in sorted(random.Random(seed).sample(range(len(everything)), most))]


def parts_of(facts: Sequence[Record], count: int) -> list[list[Record]]:
    """The facts in so many consecutive parts of nearly equal size; fewer where there are fewer facts."""
    count = max(1, min(count, len(facts)))
    bounds = [round(at * len(facts) / count) for at in range(count + 1)]
    return [list(facts[start:stop]) for start, stop in itertools.pairwise(bounds)]
