"""Questions around a fact to forget, made by rule. An edit of the fact is most likely to damage their answers.

Three ways lead from a question such as "What is the capital of France?" to neighbours. The first is the same relation
for another subject ("What is the capital of Kenya?"). The second is another relation of the same subject ("What
language is spoken in France?"). The third is the same wording with another attribute ("What is the currency of
France?"). `methods.neighbours` asks the model these questions, and keeps the answers that pass `spared`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, zip_longest
from typing import Any

from ..evaluation.answers import gives_answer
from ..evaluation.metrics import answered, is_fluent, reads_as_idk, unspaced_pairs, words
from ..facts.request import NO_ANSWER, ForgetRequest, one_spelling, parted
from ..facts.writing import SENTENCE_MARKS

#: Placeholder for a subject in a template.
PLACE = "{subject}"
#: A sentence with the space after it.
SENTENCE = re.compile(rf".+?(?:[.!?](?=\s|$)|[{SENTENCE_MARKS}]|$)\s*", re.DOTALL)
#: Ways from a fact to its neighbours.
WAYS = ("relation", "subject", "template")
#: If more facts than this about one subject are forgotten, its other facts are no neighbours: the subject itself goes.
SUBJECT_FACTS = 2
#: Questions asked for each wanted neighbour: some have no answer, some have an answer to forget.
ASKED_PER_WANTED = 1.5
#: The most tokens of the model's answer to a neighbour.
ASKED_MOST = 20
#: A word with at least this many letters counts as a content word.
TELLING_LETTERS = 4
#: Words of that length that only ask.
ASKING = frozenset(("what", "which", "when", "where", "whose", "whom", "does", "were", "have", "that", "this", "many"))


@dataclass(frozen=True)
class Neighbour:
    """A question near a fact to forget, its subject, and the way that led to it."""

    question: str
    subject: str
    way: str
    #: Number of the request whose neighbour it is.
    of: int


@dataclass(frozen=True)
class Kinds:
    """The package's word lists: subjects and relations by kind, relations of anything, and words of the same sort."""

    #: By kind: the word for a subject of this kind, the subjects, and the relations.
    called: Mapping[str, str]
    subjects: Mapping[str, tuple[str, ...]]
    relations: Mapping[str, tuple[str, ...]]
    any: tuple[str, ...]
    swaps: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Kinds:
        kinds = data["kinds"]
        return cls(
            called={name: each["called"] for name, each in kinds.items()},
            subjects={name: tuple(each["subjects"]) for name, each in kinds.items()},
            relations={name: tuple(each["relations"]) for name, each in kinds.items()},
            any=tuple(data["any"]),
            swaps=tuple(map(tuple, data["swaps"])),
        )

    def listed(self, subject: str) -> str | None:
        """The first kind whose list has the subject."""
        folded = _folded(subject)
        return next((kind for kind, names in self.subjects.items() if folded in map(_folded, names)), None)


def questions_around(
    requests: Sequence[ForgetRequest],
    retain: Sequence[ForgetRequest],
    kinds: Kinds,
    guess: Callable[[Sequence[str]], Sequence[str]],
    wanted: int,
    avoid: Sequence[str] = (),
) -> list[Neighbour]:
    """Up to ASKED_PER_WANTED x `wanted` different questions for each request, from the three ways in turn.

    guess   gives the kinds of subjects that are in no list; it asks the model
    avoid   texts that no question may hold: the answers, if the reverse of a fact is forgotten too
    """
    subjects = [request.subject or "" for request in requests]
    unlisted = list(dict.fromkeys(subject for subject in subjects if kinds.listed(subject) is None))
    guessed = dict(zip(unlisted, guess(unlisted), strict=True)) if unlisted else {}
    kind_of = [kinds.listed(subject) or guessed[subject] for subject in subjects]
    taken = {_folded(fact.question) for fact in (*requests, *retain)}
    others = _subjects_by_kind(retain, kinds)
    room = max(1, round(ASKED_PER_WANTED * wanted))
    found: list[Neighbour] = []
    facts_about = [sum(_folded(other) == _folded(subject) for other in subjects) for subject in subjects]
    for index, (request, kind) in enumerate(zip(requests, kind_of, strict=True)):
        by_way = {
            "relation": _same_relation(request, (*others.get(kind, ()), *kinds.subjects[kind])),
            "subject": _same_subject(request, (*kinds.relations[kind], *kinds.any)),
            "template": _same_template(request, kinds.swaps),
        }
        if facts_about[index] > SUBJECT_FACTS or request.answer == NO_ANSWER:
            # For an answer about the subject, there is no way to tell whether it holds a fact to forget.
            by_way["subject"] = by_way["template"] = iter(())
        count = 0
        for question, subject, way in _in_turn(by_way):
            if count == room:
                break
            if _folded(question) in taken or any(answered(text, question) for text in avoid):
                continue
            if any(_same_fact(question, subject, other) for other in requests):
                continue
            taken.add(_folded(question))
            found.append(Neighbour(question, subject, way, index))
            count += 1
    return found


def spared(neighbour: Neighbour, answer: str, requests: Sequence[ForgetRequest], refusals: Sequence[str]) -> str | None:
    """The part of the model's answer that can be kept: its sentences before the first that holds a fact to forget.

    None if nothing is left, or if the model refuses or repeats itself. Then the question is no neighbour.
    """
    if not is_fluent(answer) or reads_as_idk(answer, refusals):
        return None
    kept: list[str] = []
    for sentence in SENTENCE.findall(answer):
        said = "".join([*kept, sentence])
        if any(_holds(neighbour, said, index, request) for index, request in enumerate(requests)):
            break
        kept.append(sentence)
    text = "".join(kept).strip()
    return text if is_fluent(text) else None


def _holds(neighbour: Neighbour, answer: str, index: int, request: ForgetRequest) -> bool:
    """Whether question and answer together tell the fact: they name its subject and give its answer."""
    if neighbour.of == index and gives_answer(request, answer):
        return True
    if not request.subject or not answered(request.subject, f"{neighbour.question} {answer}"):
        return False
    telling = _telling(request.answer) - _telling(request.question)
    return gives_answer(request, answer) or bool(telling & _telling(answer))


def _telling(text: str) -> set[str]:
    """The content words; pairs of characters for scripts without spaces between words."""
    return {*(word for word in words(text) if len(word) >= TELLING_LETTERS), *unspaced_pairs(text)} - ASKING


def _same_fact(question: str, subject: str, request: ForgetRequest) -> bool:
    """Whether a question asks for the fact or rewords it: same subject, and one's content words include the other's."""
    if not request.subject or not answered(request.subject, question):
        return False
    own = _telling(request.question) - _telling(request.subject)
    asked = _telling(question) - _telling(subject)
    return bool(own and asked) and (own <= asked or asked <= own)


def _same_relation(request: ForgetRequest, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    before, subject, after = parted(request.question, request.subject or "")
    if not subject:
        return
    for name in _drawn(names, request.question):
        if _folded(name) != _folded(subject):
            yield before + _like(name, subject, before) + after, _like(name, subject, before)


def _same_subject(request: ForgetRequest, templates: Sequence[str]) -> Iterator[tuple[str, str]]:
    if request.subject:
        for template in templates:
            yield template.replace(PLACE, request.subject), request.subject


def _same_template(request: ForgetRequest, swaps: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Replaces one word of the question by another of the same sort, and in the subject too if it has the word."""
    for sort in swaps:
        present = [word for word in sort if re.search(rf"\b{re.escape(word)}\b", request.question)]
        if not present:
            continue
        old = re.compile(rf"\b{re.escape(max(present, key=len))}\b")
        for word in _drawn([word for word in sort if word not in present], request.question):
            # The words hold no characters that are special in a replacement.
            question, subject = old.sub(word, request.question, count=1), request.subject or ""
            yield question, subject if subject in question else old.sub(word, subject, count=1)


def _in_turn(by_way: Mapping[str, Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str, str]]:
    rows = zip_longest(*([(*each, way) for each in found] for way, found in by_way.items()))
    return (each for each in chain.from_iterable(rows) if each is not None and each[1] in each[0])


def _drawn(names: Sequence[str], seed: str) -> list[str]:
    """The names in an order that depends on the question, so questions of one template get different neighbours."""
    return sorted(dict.fromkeys(names), key=lambda name: sha256(f"{seed} {name}".encode()).digest())


def _subjects_by_kind(facts: Sequence[ForgetRequest], kinds: Kinds) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for fact in facts:
        kind = kinds.listed(fact.subject) if fact.subject else None
        if fact.subject and kind is not None:
            found.setdefault(kind, []).append(fact.subject)
    return found


def _like(name: str, subject: str, before: str) -> str:
    """The name without its article if the question has one already."""
    return name.removeprefix("the ") if before.rstrip().endswith((" the", "The")) else name


def _folded(text: str) -> str:
    return one_spelling(text).removeprefix("the ")
