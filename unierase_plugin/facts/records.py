"""Turns records of any source into requests. Each request keeps the place of its record."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import PluginError, RequestError, did_you_mean, first_words, listed, shown
from .request import ForgetRequest, one_spelling

#: What stands before the colon of a spec. At least two letters: `C:` before a path is a drive.
PREFIX = re.compile(r"[A-Za-z][\w-]+")

Reader = Callable[[str], Sequence[ForgetRequest]]
"""Takes what follows the colon of a spec, slice removed; returns requests or raises `RequestError`."""


@dataclass(frozen=True)
class Benchmark:
    """Facts that methods are compared on, and what belongs to them.

    Raises PluginError for a name that no spec can begin with, and for a folder of tasks that is not there.
    """

    #: What a spec begins with: `--forget NAME:...`. A letter, then letters, digits, hyphens and underscores.
    name: str
    #: One line that says what the facts are.
    title: str
    #: The work to cite.
    paper: str
    #: Reads the facts that the rest of the spec names.
    read: Reader = field(repr=False)
    #: Folder of its lm-eval tasks, as YAML files; None without any.
    tasks: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not PREFIX.fullmatch(self.name):
            raise PluginError(
                f"A benchmark cannot be called {shown(self.name)}: use a letter, then at least one more letter, digit, "
                "hyphen or underscore."
            )
        if self.tasks is not None and not os.path.isdir(self.tasks):
            raise PluginError(f"The tasks of the benchmark {self.name!r} are not there: no folder {str(self.tasks)!r}.")


Record = Mapping[str, Any]
Located = tuple[str, Record]
"""Where a record was found (`forget01.json, line 3`), and the record."""

#: Messages name a fact of a list in memory by this word and its number in the list.
AT_HAND = "request"

#: Fields of a record that hold paraphrases of its question, and wrong answers.
PARAPHRASES_FIELDS = ("paraphrases", "paraphrased_question")
WRONG_ANSWERS_FIELDS = ("wrong_answers", "perturbed_answer")


def build_requests(records: Iterable[tuple[str, ForgetRequest | Record]], stem: str) -> tuple[ForgetRequest, ...]:
    """Turns records with their places into requests.

    The fields are `question`, `answer`, and optionally `subject`, `case_id` and `target`. `paraphrases` or
    `paraphrased_question` hold the question in other words, `paraphrased_answer` holds the answer in other words, and
    `wrong_answers` or `perturbed_answer` hold wrong answers. Each of these is a text or a list of texts; anything else
    counts as absent. Other fields are ignored, since benchmarks have many.

    Raises `RequestError` with the record's place.
    """
    return with_case_ids([_placed(where, _build_request(where, record)) for where, record in records], stem)


def _placed(where: str, request: ForgetRequest) -> ForgetRequest:
    # A fact of a list in memory is named by its number.
    return request if where.startswith(AT_HAND) or request.place else replace(request, place=where)


def _build_request(where: str, record: ForgetRequest | Record) -> ForgetRequest:
    if isinstance(record, ForgetRequest):
        return record
    if not isinstance(record, Mapping):
        raise RequestError(f"{where}: expected an object with 'question' and 'answer', got {first_words(record)}.")
    question, answer = field_of(where, record, "question"), field_of(where, record, "answer")
    case_id: Any = record.get("case_id")
    try:
        # CounterFact has whole numbers as case_id.
        name = str(case_id) if type(case_id) is int else case_id
        return ForgetRequest(
            question=question,
            answer=answer,
            subject=record.get("subject"),
            case_id=name,
            target=record.get("target"),
            paraphrases=tuple(
                dict.fromkeys(text for text in _texts(record, PARAPHRASES_FIELDS) if text != question),
            ),
            wrong_answers=_texts(record, WRONG_ANSWERS_FIELDS),
            paraphrased_answer=next(iter(_texts(record, ("paraphrased_answer",))), None),
        )
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _texts(record: Record, names: Sequence[str]) -> tuple[str, ...]:
    values = [record.get(name) or () for name in names]
    listed = [text for value in values if isinstance(value, Iterable) for text in _listed(value)]
    return tuple(text for text in listed if isinstance(text, str) and text.strip())


def _listed(value: Iterable[Any]) -> Iterable[Any]:
    return [value] if isinstance(value, str) else value


def with_extras(requests: Iterable[ForgetRequest], beside: Iterable[ForgetRequest]) -> tuple[ForgetRequest, ...]:
    """Returns the requests, with missing paraphrases, wrong answers and paraphrased answers taken from `beside`.

    Requests are matched by question. If several in `beside` have one question, the last one counts.
    """
    found = {one_spelling(each.question): each for each in beside}

    def filled(request: ForgetRequest) -> ForgetRequest:
        other = found.get(one_spelling(request.question))
        if other is None:
            return request
        return replace(
            request,
            paraphrases=request.paraphrases or other.paraphrases,
            wrong_answers=request.wrong_answers or other.wrong_answers,
            paraphrased_answer=request.paraphrased_answer or other.paraphrased_answer,
        )

    return tuple(map(filled, requests))


def field_of(where: str, record: Record, name: str) -> Any:
    """The value of a required field. `ForgetRequest` checks its type."""
    if not isinstance(record, Mapping) or record.get(name) is None:
        keys = [key for key in record if isinstance(key, str)] if isinstance(record, Mapping) else []
        raise RequestError(
            f"{where}: the field {name!r} is missing.{did_you_mean(name, [k for k in keys if k != name])} "
            f"Present: {listed(keys)}."
        )
    return record[name]


def with_case_ids(requests: Iterable[ForgetRequest], stem: str) -> tuple[ForgetRequest, ...]:
    """Gives a request without a case_id the name `<stem>-<index>`."""
    return tuple(
        request if request.case_id is not None else replace(request, case_id=f"{stem}-{index}")
        for index, request in enumerate(requests)
    )
