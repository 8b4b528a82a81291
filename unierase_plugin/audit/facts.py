"""The facts of an audit, with what the data holds beside question and answer: paraphrases and wrong answers."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.metrics import answered
from ..facts.benchmarks import TOFU_SPLITS
from ..facts.files import FILE_SUFFIXES, iter_records
from ..facts.readers import read_requests
from ..facts.records import Reader, Record
from ..facts.request import ForgetRequest, one_spelling
from .contract import Fact

logger = logging.getLogger(__name__)

Facts = str | os.PathLike[str] | Iterable[ForgetRequest | Record]


def read_facts(spec: Facts, readers: Mapping[str, Reader] | None = None) -> tuple[Fact, ...]:
    """The facts that a spec names (`readers.read_requests`), each once, with their paraphrases and wrong answers.

    These come from the fields `paraphrased_question` or `paraphrases` and `perturbed_answer` or `wrong_answers` of a
    file's records or of mappings at hand and, for `tofu:<split>`, from TOFU's `<split>_perturbed`.
    """
    if not isinstance(spec, (str, os.PathLike)):
        spec = list(spec)
        extras = {one_spelling(str(each.get("question"))): each for each in spec if isinstance(each, Mapping)}
    else:
        extras = {one_spelling(str(record.get("question"))): record for record in _records(os.fspath(spec))}
    found = {}
    for request in read_requests(spec, readers):
        key = one_spelling(request.question)
        extra = extras.get(key, {})
        found[key] = Fact(
            request.question,
            request.answer,
            request.subject,
            _texts(extra, "paraphrases", "paraphrased_question"),
            _texts(extra, "wrong_answers", "perturbed_answer"),
        )
    return tuple(found.values())


def _texts(record: Record, *names: str) -> tuple[str, ...]:
    values = [record.get(name) or () for name in names]
    listed = [text for value in values for text in ([value] if isinstance(value, str) else value)]
    return tuple(dict.fromkeys(text for text in listed if isinstance(text, str) and text != record.get("question")))


def _records(spec: str) -> Iterator[Record]:
    """Records that may hold more than question and answer; none for the other benchmarks."""
    source = spec.strip().partition("[")[0]
    prefix, _, split = source.partition(":")
    if prefix == "tofu":
        name = "retain_perturbed" if split.startswith("retain") else f"{split.removesuffix('_perturbed')}_perturbed"
        return _perturbed(name) if name in TOFU_SPLITS else iter(())
    if source.lower().endswith(FILE_SUFFIXES) and Path(source).is_file():
        return (record for _, record in iter_records(source) if isinstance(record, Mapping))
    return iter(())


def _perturbed(name: str) -> Iterator[Any]:
    folder = os.environ.get("UNIERASE_TOFU_DIR")
    if folder:
        path = Path(folder) / f"{name}.json"
        return (record for _, record in iter_records(path)) if path.is_file() else iter(())
    try:
        from datasets import load_dataset

        return iter(load_dataset("locuslab/TOFU", name, split="train"))
    except Exception as error:  # the hub's client raises many kinds; paraphrases are an extra that one can do without
        logger.warning("No paraphrases: %s cannot be read (%s).", name, error)
        return iter(())


def judgeable(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """Facts whose question does not already count as the answer: an echo of it would pass for knowledge."""
    return tuple(fact for fact in facts if not answered(fact.answer, fact.question, fact.question))


def sample(facts: Sequence[Fact], most: int, seed: int) -> tuple[Fact, ...]:
    """At most so many of the facts, drawn over all of them, since files are often sorted by subject; in their order."""
    chosen = sorted(random.Random(seed).sample(range(len(facts)), min(most, len(facts))))
    return tuple(facts[index] for index in chosen)
