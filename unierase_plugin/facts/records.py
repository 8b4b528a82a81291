"""Turns records of any source into requests. Each request keeps the place of its record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RequestError, did_you_mean, first_words, listed
from .request import ForgetRequest

Reader = Callable[[str], Sequence[ForgetRequest]]
"""Takes what follows the colon of a spec, slice removed; returns requests or raises `RequestError`."""

Record = Mapping[str, Any]
Located = tuple[str, Record]
"""Where a record was found (`forget01.json, line 3`), and the record."""

#: Messages name a fact of a list in memory by this word and its number in the list.
AT_HAND = "request"


def build_requests(records: Iterable[tuple[str, ForgetRequest | Record]], stem: str) -> tuple[ForgetRequest, ...]:
    """Turns records with their places into requests.

    The fields are `question`, `answer`, and optionally `subject`, `case_id` and `target`. Other fields are ignored:
    benchmarks have many. Raises `RequestError` with the record's place.
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
        return ForgetRequest(question, answer, record.get("subject"), name, record.get("target"))
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


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
