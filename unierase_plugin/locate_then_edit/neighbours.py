"""Questions around a fact to forget, made by rule: what an edit of it is most likely to take along.

Three ways lead away from a question "What is the capital of France?": the same relation for another subject ("What is
the capital of Kenya?"), another relation of the same subject ("What language is spoken in France?"), and its wording
with another attribute ("What is the currency of France?"). Which of them the model can answer, and what it says, only
the model knows: `keeping` asks it, and keeps what passes `spared`.
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

#: Where a subject stands in a template.
PLACE = "{subject}"
#: A sentence with the space behind it.
SENTENCE = re.compile(rf".+?(?:[.!?](?=\s|$)|[{SENTENCE_MARKS}]|$)\s*", re.DOTALL)
#: Ways from a fact to its neighbours.
WAYS = ("relation", "subject", "template")
#: Facts about one subject up to which its other facts are neighbours; with more of them it is the subject that goes.
SUBJECT_FACTS = 2
#: Questions asked for each neighbour wanted: some have no answer, some an answer that is to be forgotten.
ASKED_PER_WANTED = 1.5
#: Tokens at most of the model's answer to a neighbour.
ASKED_MOST = 20
#: Letters from which a word says something of its own.
TELLING_LETTERS = 4
#: Words of that length which only ask.
ASKING = frozenset(("what", "which", "when", "where", "whose", "whom", "does", "were", "have", "that", "this", "many"))


@dataclass(frozen=True)
class Neighbour:
    """A question near a fact to forget, what it is about, and the way that led to it."""

    question: str
    subject: str
    way: str
    #: Number of the request that it is a neighbour of.
    of: int


@dataclass(frozen=True)
class Kinds:
    """What ships with the package: subjects and relations by kind, relations of anything, and words of one sort."""

    #: By kind: what a subject of it is called, the subjects, the relations.
    called: Mapping[str, str]
    subjects: Mapping[str, tuple[str, ...]]
    relations: Mapping[str, tuple[str, ...]]
    any: tuple[str, ...]
    swaps: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Kinds:
        kinds = data["kinds"]
        return cls(
            {name: each["called"] for name, each in kinds.items()},
            {name: tuple(each["subjects"]) for name, each in kinds.items()},
            {name: tuple(each["relations"]) for name, each in kinds.items()},
            tuple(data["any"]),
            tuple(map(tuple, data["swaps"])),
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
    """Up to ASKED_PER_WANTED x `wanted` questions for each request, the three ways in turn, no question twice.

    guess   the kinds of subjects that no list has, from the model
    avoid   texts that no question may hold: answers, where the reverse of a fact is to be forgotten too
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
            # Nothing could tell whether an answer about the subject holds what is to be forgotten.
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
    """What of the model's answer can be kept: its sentences before the first that holds a fact to forget.

    None where nothing is left, or the model refuses or loops: then the question is no neighbour.
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
    """Words that say something of their own; where no spaces part words, pairs of characters."""
    return {*(word for word in words(text) if len(word) >= TELLING_LETTERS), *unspaced_pairs(text)} - ASKING


def _same_fact(question: str, subject: str, request: ForgetRequest) -> bool:
    """Whether a question asks for the fact or rewords it: its subject, and telling words of which one has all."""
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
    """One word of the question for another of its sort; the subject with it where it has the word."""
    for sort in swaps:
        present = [word for word in sort if re.search(rf"\b{re.escape(word)}\b", request.question)]
        if not present:
            continue
        old = re.compile(rf"\b{re.escape(max(present, key=len))}\b")
        for word in _drawn([word for word in sort if word not in present], request.question):
            # The words of a sort hold nothing that a replacement would read as more than itself.
            question, subject = old.sub(word, request.question, count=1), request.subject or ""
            yield question, subject if subject in question else old.sub(word, subject, count=1)


def _in_turn(by_way: Mapping[str, Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str, str]]:
    rows = zip_longest(*([(*each, way) for each in found] for way, found in by_way.items()))
    return (each for each in chain.from_iterable(rows) if each is not None and each[1] in each[0])


def _drawn(names: Sequence[str], seed: str) -> list[str]:
    """In an order of the question's own, so that two questions of one template have other neighbours."""
    return sorted(dict.fromkeys(names), key=lambda name: sha256(f"{seed} {name}".encode()).digest())


def _subjects_by_kind(facts: Sequence[ForgetRequest], kinds: Kinds) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for fact in facts:
        kind = kinds.listed(fact.subject) if fact.subject else None
        if fact.subject and kind is not None:
            found.setdefault(kind, []).append(fact.subject)
    return found


def _like(name: str, subject: str, before: str) -> str:
    """The name without its article where the question brings one."""
    return name.removeprefix("the ") if before.rstrip().endswith((" the", "The")) else name


def _folded(text: str) -> str:
    return one_spelling(text).removeprefix("the ")
