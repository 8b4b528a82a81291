"""One fact to forget: a question, its answer, and the subject, the words of the question that the fact is about.

Every stage takes the type `ForgetRequest`. `facts.readers` reads requests from files and benchmarks.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..errors import RequestError, first_words, shown
from .subjects import find_subject, is_unread
from .writing import standing

logger = logging.getLogger(__name__)

#: Stands for an answer that a harness does not give. UniErase trains on answers only with hardening.
NO_ANSWER = "(not given)"
#: A message about several facts names at most this many.
SHOWN_FACTS = 3


@dataclass(frozen=True)
class ForgetRequest:
    """One fact to forget.

    Raises `RequestError` if a field has the wrong type, is blank, or holds half a surrogate pair or a NUL character.
    It also does so if `subject` does not occur in `question`.

    Runs, records and caches use the first five fields alone. Audits and comparisons use the others too.
    """

    question: str
    """The prompt as a user would write it, without chat template."""
    answer: str
    """The answer to forget. Methods that edit read it only if they are hardened."""
    subject: str | None = None
    """The span of `question` that names what the fact is about. The edit takes its key at the last token of the span.
    A subject in another normal form of Unicode is replaced by the question's spelling."""
    case_id: str | None = None
    """A name for ledgers and reports. Readers fill it with `<file stem or split>-<index>`."""
    target: str | None = None
    """What the model says after the unlearning token. Without it, UniErase takes an "I don't know" sentence."""
    place: str | None = field(default=None, compare=False, repr=False)
    """The file with line, item or row that it was read from, for messages."""
    paraphrases: tuple[str, ...] = ()
    """The question in other words."""
    wrong_answers: tuple[str, ...] = ()
    """Answers that are not true, of the same form as `paraphrased_answer`."""
    paraphrased_answer: str | None = None
    """The true answer in other words: a truth ratio compares it with the wrong answers."""

    def __post_init__(self) -> None:
        for name in ("question", "answer", "subject", "case_id", "target", "paraphrased_answer"):
            value = getattr(self, name)
            if value is not None or name in ("question", "answer"):
                self._check(name, value)
        for name in ("paraphrases", "wrong_answers"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise RequestError(
                    f"{name!r} must be a list of strings, got {first_words(values)}{self._which(name)}. Put one string "
                    "in a list."
                )
            for value in values:
                self._check(name, value)
            object.__setattr__(self, name, tuple(values))
        if self.subject is not None and self.subject not in self.question:
            found = _spelled_in(self.question, self.subject)
            if found is not None:
                object.__setattr__(self, "subject", found)
                return
            raise RequestError(
                f"The subject {first_words(self.subject)} does not occur in the question {first_words(self.question)}"
                f"{self._which()}. Copy a span of the question letter by letter, or leave the subject out: then a rule "
                "finds it."
            )

    def _check(self, name: str, value: Any) -> None:
        if not isinstance(value, str) or not value.strip():
            raise RequestError(
                f"{name!r} must be a string that is not blank, got {first_words(value)}{self._which(name)}."
            )
        if "\0" in value or not _is_encodable(value):
            what = "a NUL character" if "\0" in value else "half a surrogate pair, which is no character"
            raise RequestError(f"{name!r} holds {what}{self._which(name)}. Save the text again in UTF-8.")

    @property
    def label(self) -> str:
        """The fact's name in messages: its case_id or the first words of its question, and its place."""
        name = first_words(self.question) if self.case_id is None else shown(self.case_id)
        return name if self.place is None else f"{name} ({self.place})"

    def _which(self, field: str = "") -> str:
        """Names the fact in a message about one of its fields."""
        return "" if field == "case_id" or self.case_id is None else f" (case_id {shown(self.case_id)})"


def _spelled_in(text: str, part: str) -> str | None:
    """The text's own spelling of a part that differs from it only in the normal form of Unicode."""
    wanted = unicodedata.normalize("NFC", part)
    if wanted not in unicodedata.normalize("NFC", text):
        return None
    # A letter and the marks that follow it stay together.
    ends = [end for end in range(1, len(text) + 1) if unicodedata.category(f"{text} "[end])[0] != "M"]
    spans = (text[start:end] for start in range(len(text)) for end in ends if end > start)
    return next((span for span in spans if unicodedata.normalize("NFC", span) == wanted), None)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_subjects(requests: Iterable[ForgetRequest]) -> tuple[ForgetRequest, ...]:
    """Returns the requests with every missing subject filled in by `find_subject`. Given subjects stay.

    Warns once about all questions that the rule cannot read. Raises `RequestError` if a question names nothing that
    could be a subject.
    """
    given = tuple(requests)
    tell_unread(given)
    return tuple(_with_subject(index, request) for index, request in enumerate(given))


def tell_unread(requests: Sequence[ForgetRequest]) -> None:
    """Warns, once for all requests, if a missing subject would be nearly the whole question."""
    unread = [request for request in requests if request.subject is None and is_unread(request.question)]
    if unread:
        logger.warning(
            "%d of %d facts have no subject, and the subject rule cannot read their questions. It takes nearly the "
            "whole question: %s%s. Give each fact a 'subject', the span of the question that names what the fact is "
            "about.",
            len(unread),
            len(requests),
            ", ".join(request.label for request in unread[:SHOWN_FACTS]),
            _more(len(unread)),
        )


def _with_subject(index: int, request: ForgetRequest) -> ForgetRequest:
    if request.subject is not None:
        return request
    subject = find_subject(request.question)
    if subject is None:
        raise RequestError(
            f"No subject found in the question of {_label(index, request)}: {first_words(request.question)}. Give "
            f"its 'subject', a span of the question that names what the fact is about."
        )
    return replace(request, subject=subject)


def one_spelling(text: str) -> str:
    """A form in which two spellings of one text are equal: NFC, single spaces, case folded.

    NFC, not NFKC: 10\u2075 and 105 are two numbers.
    """
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def check_requests(requests: Iterable[ForgetRequest]) -> tuple[ForgetRequest, ...]:
    """Returns the requests as a tuple; raises `RequestError` if there are none or a question occurs twice.

    Questions are compared in `one_spelling`. Two keys that are nearly equal have two answers for one position, and make
    the edit's linear system nearly singular.
    """
    checked = tuple(requests)
    if not checked:
        raise RequestError(
            "There is nothing to forget: the list of requests is empty. Give at least one ForgetRequest."
        )
    seen: dict[str, str] = {}
    for index, request in enumerate(checked):
        label = _label(index, request)
        folded = one_spelling(request.question)
        if folded in seen:
            raise RequestError(
                f"The question {first_words(request.question)} is asked twice, by {seen[folded]} and {label}. Remove "
                "one of them."
            )
        seen[folded] = label
    return checked


class Asked(Protocol):
    """Anything with a question and a name for messages."""

    @property
    def question(self) -> str: ...

    @property
    def label(self) -> str: ...


#: The purpose of a set of facts, as messages say it.
TO_FORGET, TO_KEEP, HELD_OUT = "to be forgotten", "to be kept", "never to have been trained on"


def check_overlap(one: Iterable[Asked], other: Iterable[Asked], first: str = TO_FORGET, second: str = TO_KEEP) -> None:
    """Raises `RequestError` if both sets ask the same question, whatever the answers are.

    first, second: the purposes of the two sets.
    """
    own = {one_spelling(fact.question): fact.label for fact in one}
    shared = [(own[key], fact.label) for fact in other if (key := one_spelling(fact.question)) in own]
    if shared:
        named = ", ".join(here if here == there else f"{here} (there {there})" for here, there in shared[:SHOWN_FACTS])
        raise RequestError(
            f"{_facts(len(shared))} {first} and {second} at once: {named}{_more(len(shared))}. Take "
            f"{'it' if len(shared) == 1 else 'them'} out of one of the two sets. If that is intended, allow it with "
            "allow_overlap=True (--allow-overlap)."
        )


def check_not_forgotten(facts: Sequence[Asked], forgotten: Iterable[int], where: str, kept: str = TO_KEEP) -> None:
    """Raises `RequestError` if an earlier step of `where` forgot one of the facts, given by their numbers.

    kept: the purpose of the facts.
    """
    labels = [facts[index].label for index in forgotten]
    if labels:
        raise RequestError(
            f"{_facts(len(labels))} {kept}, but {'was' if len(labels) == 1 else 'were'} forgotten in an earlier "
            f"step of {where}: {', '.join(labels[:SHOWN_FACTS])}{_more(len(labels))}. Leave "
            f"{'it' if len(labels) == 1 else 'them'} out, or take the request back first (unierase revert --request). "
            "If that is intended, allow it with allow_overlap=True (--allow-overlap)."
        )


def _facts(count: int) -> str:
    return "1 fact is" if count == 1 else f"{count} facts are"


def _more(count: int) -> str:
    return f" and {count - SHOWN_FACTS} more" if count > SHOWN_FACTS else ""


def _label(index: int, request: ForgetRequest) -> str:
    place = request.place or f"request {index}"
    return place if request.case_id is None else f"{place} (case_id {shown(request.case_id)})"


def parted(question: str, subject: str) -> tuple[str, str, str]:
    """The question before the subject, the subject, and the rest, at the subject's last occurrence as whole words.

    Without such an occurrence, at its last occurrence of any kind; ("", "", question) if there is none. The Euro of
    "Which European country has the Euro outside Europe?" is neither in "European" nor in "Europe".
    """
    if not subject:
        return "", "", question
    at = max((start for start, _ in standing(question, subject)), default=question.rfind(subject))
    return ("", "", question) if at < 0 else (question[:at], subject, question[at + len(subject) :])


def has_word(text: str, name: str) -> bool:
    """Whether the name occurs in the text as whole words."""
    return bool(standing(text, name))
