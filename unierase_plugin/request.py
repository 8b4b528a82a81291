"""What is to be forgotten: one question and its answer, and the words of the question that the fact is about.

`ForgetRequest` is the type that every stage takes. Reading requests from files and benchmarks is in `readers`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from .errors import RequestError, first_words, shown
from .writing import standing

#: Stands for an answer that a harness does not say: UniErase trains on answers only where it is hardened.
NO_ANSWER = "(not given)"
#: Facts that a message about several names.
SHOWN_FACTS = 3


@dataclass(frozen=True)
class ForgetRequest:
    """One fact to forget.

    Raises `RequestError` when a field has the wrong type, is blank or holds what no text does (half a surrogate pair, a
    NUL character), or when `subject` does not occur in `question`.
    """

    question: str
    """The prompt as a user would write it, without chat template."""
    answer: str
    """What the model is to stop saying; methods that edit look at it only where they are hardened."""
    subject: str | None = None
    """The span of `question` that names what the fact is about, in its spelling; its last token is where the edit is
    keyed. A subject in another normal form of Unicode is taken for the question's span."""
    case_id: str | None = None
    """A name for ledgers and reports; readers fill it with `<file stem or split>-<index>`."""
    target: str | None = None
    """What UniErase has the model say after its token; an "I don't know" sentence where nothing is given."""
    place: str | None = field(default=None, compare=False, repr=False)
    """The file and line, item or row that it was read from, for messages."""

    def __post_init__(self) -> None:
        for name in ("question", "answer", "subject", "case_id", "target"):
            value = getattr(self, name)
            if value is None and name in ("subject", "case_id", "target"):
                continue
            if not isinstance(value, str) or not value.strip():
                raise RequestError(
                    f"{name!r} must be a string that is not blank, got {first_words(value)}{self._which(name)}."
                )
            if "\0" in value or not _is_encodable(value):
                what = "a NUL character" if "\0" in value else "half a surrogate pair, which is no character"
                raise RequestError(f"{name!r} holds {what}{self._which(name)}. Write the text anew in UTF-8.")
        if self.subject is not None and self.subject not in self.question:
            found = _spelled_in(self.question, self.subject)
            if found is not None:
                object.__setattr__(self, "subject", found)
                return
            raise RequestError(
                f"The subject {first_words(self.subject)} does not occur in the question {first_words(self.question)}"
                f"{self._which()}. Give a span of the question, letter by letter, or leave the subject out to have it "
                "found."
            )

    @property
    def label(self) -> str:
        """How a message names the fact: by its case_id, else by the first words of its question, and its place."""
        name = first_words(self.question) if self.case_id is None else shown(self.case_id)
        return name if self.place is None else f"{name} ({self.place})"

    def _which(self, field: str = "") -> str:
        """Names the fact in a message about a field of it."""
        return "" if field == "case_id" or self.case_id is None else f" (case_id {shown(self.case_id)})"


def _spelled_in(text: str, part: str) -> str | None:
    """The part as the text spells it, where the two differ in Unicode's normal form alone."""
    wanted = unicodedata.normalize("NFC", part)
    if wanted not in unicodedata.normalize("NFC", text):
        return None
    # A letter keeps the marks that follow it.
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
    """Return the requests with every missing subject filled by `find_subject`; given subjects stay as they are.

    Raises `RequestError` where the question names nothing that could be a subject.
    """
    return tuple(_with_subject(index, request) for index, request in enumerate(requests))


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
    """What two texts share that name the same fact: in Unicode's NFC, white space collapsed, case folded.

    NFC, not NFKC: 10\u2075 and 105 are two numbers.
    """
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def check_requests(requests: Iterable[ForgetRequest]) -> tuple[ForgetRequest, ...]:
    """Return the requests as a tuple when there is at least one and no question occurs twice.

    Questions are compared in `one_spelling`: two keys that are all but equal would make the edit's linear system nearly
    singular, with two answers fighting over one position. Raises `RequestError` otherwise.
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


#: What a set of facts is for, as messages say it.
TO_FORGET, TO_KEEP, HELD_OUT = "to be forgotten", "to be kept", "never to have been trained on"


def check_overlap(one: Iterable[Asked], other: Iterable[Asked], first: str = TO_FORGET, second: str = TO_KEEP) -> None:
    """Raises `RequestError` where a question is asked in both sets, with the same answer or another.

    first, second: what the sets are for.
    """
    own = {one_spelling(fact.question): fact.label for fact in one}
    shared = [(own[key], fact.label) for fact in other if (key := one_spelling(fact.question)) in own]
    if shared:
        named = ", ".join(here if here == there else f"{here} (there {there})" for here, there in shared[:SHOWN_FACTS])
        raise RequestError(
            f"{_facts(len(shared))} {first} and {second} at once: {named}{_more(len(shared))}. Take "
            f"{'it' if len(shared) == 1 else 'them'} out of one of the two sets. Where that is meant, allow it with "
            "allow_overlap=True (--allow-overlap)."
        )


def check_not_forgotten(facts: Sequence[Asked], forgotten: Iterable[int], where: str, kept: str = TO_KEEP) -> None:
    """Raises `RequestError` where facts, by their numbers, were forgotten in an earlier step of `where`.

    kept: what the facts are for.
    """
    labels = [facts[index].label for index in forgotten]
    if labels:
        raise RequestError(
            f"{_facts(len(labels))} {kept}, but {'was' if len(labels) == 1 else 'were'} forgotten in an earlier "
            f"step of {where}: {', '.join(labels[:SHOWN_FACTS])}{_more(len(labels))}. Leave "
            f"{'it' if len(labels) == 1 else 'them'} out, or take the request back first (unierase revert --request). "
            "Where that is meant, allow it with allow_overlap=True (--allow-overlap)."
        )


def _facts(count: int) -> str:
    return "1 fact is" if count == 1 else f"{count} facts are"


def _more(count: int) -> str:
    return f" and {count - SHOWN_FACTS} more" if count > SHOWN_FACTS else ""


def _label(index: int, request: ForgetRequest) -> str:
    place = request.place or f"request {index}"
    return place if request.case_id is None else f"{place} (case_id {shown(request.case_id)})"


def parted(question: str, subject: str) -> tuple[str, str, str]:
    """The question before the subject, the subject, and after it: where it stands last as words of its own.

    Else where it stands last at all; ("", "", question) for nowhere. The Euro of "Which European country has the Euro
    outside Europe?" is neither in "European" nor in "Europe".
    """
    if not subject:
        return "", "", question
    at = max((start for start, _ in standing(question, subject)), default=question.rfind(subject))
    return ("", "", question) if at < 0 else (question[:at], subject, question[at + len(subject) :])


def has_word(text: str, name: str) -> bool:
    """Whether the name stands in the text as words of its own."""
    return bool(standing(text, name))


# --- The subject of a question -------------------------------------------------------------------------------------

_Word = re.Match[str]

# A word is bounded by white space and punctuation rather than made of "letters": Python's \w leaves out the vowel signs
# of Indic scripts. Apostrophes, hyphens and the like belong to a word when they stand inside it (Al-Kuwaiti, O'Brien).
# The look-alikes that the linter asks about are meant: they are how other scripts, and word processors, punctuate.
_BOUNDS = r"\s!\"$%()*,:;<=>?@\[\]\\^`{|}~—–…“”«»„،؛؟¿¡。，、？！：；（）「」『』।"  # noqa: RUF001
_JOINERS = r"'’‘\-/&._+#"  # noqa: RUF001
_WORD = re.compile(rf"[^{_BOUNDS}{_JOINERS}]+(?:[{_JOINERS}]+[^{_BOUNDS}{_JOINERS}]+)*[+#]*")
# A single quote opens only where no word stands before it and closes only where none goes on: it is no apostrophe then.
_QUOTED = re.compile(r"[\"“”„«]([^\"“”„«»]+)[\"“”»]|(?<!\w)['‘](?=\S)(.+?)(?<=\S)['’](?!\w)")  # noqa: RUF001
_POSSESSIVE = re.compile(r"['’]s$")  # noqa: RUF001
_CONTRACTED = re.compile(r"(?:n['’]t|['’]\w{1,2})$")  # noqa: RUF001
_ABBREVIATION = re.compile(r"[^\W\d_]|Dr|Jr|Mr|Mrs|Ms|Mt|Prof|Sr|St")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONNECTORS = _words("of the and de la le del della di da dos du van von der den bin ibn al el")
_MONTHS = _words("january february march april may june july august september october november december")
#: English words that name nothing.
STOP_WORDS = _words(
    """
    a an the i you he she it we they me him her us them my your his its our their this that these those there
    who whom whose what which when where why how is are was were be been being am do does did done have has had having
    can could will would shall should may might must of to in on at by for with from about into as and or but nor not if
    than then so such no yes any some more most much many other another also very between during
    define describe discuss explain give identify list mention name please provide share state tell
    """
)


def find_subject(question: str) -> str | None:
    """Return the span of `question` that most likely names what it is about, or None where nothing is left to name.

    The rule is fixed and needs no model; the first of these that yields anything wins.

    1. The run of capitalised words outside quotation marks that has the most of them, the first such run on a tie, when
       it has at least two. Connectors (`of`, `and`, `van`, ...) and numbers may stand inside a run; a possessive `'s`
       or punctuation ends it; the opening word alone, question words and auxiliaries are no run; months and numbers do
       not count, so that a date does not beat a name.
    2. The last text in quotation marks: `Which English author wrote 'Emma'?` is about Emma, not about English.
    3. The run of rule 1 though it has one word, or only numbers.
    4. The last run of words, in any script, that are not on a short list of English function words.

    Titles rank below full names because a question that has both is as a rule about the person. With the `subject`
    column of TOFU's forget10 as the judge, the rule gives the same last word for 372 of 400 questions (93%); taking
    quotations first gives 332. Most of the others describe a person without a name (`the author born in ...`).
    Questions in capitals throughout skip the rules that look at case. Give `subject` yourself where it matters.
    """
    quoted = _last_quoted(question)
    span, weight = _heaviest_name(question)
    if span and (weight >= 2 or quoted is None):
        return span
    return quoted or _last_content(question)


def _last_quoted(question: str) -> str | None:
    # American style puts the comma inside the quotation marks; it is no part of the title.
    texts = [(double or single).strip(" ,.;:") for double, single in _QUOTED.findall(question)]
    return next((text for text in reversed(texts) if text), None)


def _heaviest_name(question: str) -> tuple[str | None, int]:
    """The run of capitalised words with the most of them, and how many: `(None, 0)` where there is none."""
    opening = _WORD.search(question)
    if opening is None or question.isupper():
        return None, 0
    # Same length, so that positions in the masked text are positions in the question.
    outside = _QUOTED.sub(lambda quoted: '"' * len(quoted.group()), question)
    best: tuple[str | None, int] = (None, 0)
    for run in _runs(outside, _belongs_to_name):
        while run and run[-1].group() in _CONNECTORS:
            run.pop()
        weight = sum(_counts(word.group()) for word in run)
        if (len(run) == 1 and run[0].start() == opening.start()) or (best[0] is not None and weight <= best[1]):
            continue
        best = (_span(question, run), weight)
    return best


def _last_content(question: str) -> str | None:
    runs = list(_runs(question, lambda word, _: not _is_stop(word.group()) and any(map(str.isalpha, word.group()))))
    return _span(question, runs[-1]) if runs else None


def _runs(text: str, belongs: Callable[[_Word, bool], bool]) -> Iterator[list[_Word]]:
    """Maximal runs of neighbouring words for which `belongs(word, whether a run is open)` holds; never empty."""
    run: list[_Word] = []
    for word in _WORD.finditer(text):
        if run and not _adjoins(run[-1], word):
            yield run
            run = []
        if belongs(word, bool(run)):
            run.append(word)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _adjoins(left: _Word, right: _Word) -> bool:
    gap = left.string[left.end() : right.start()]
    if _ABBREVIATION.fullmatch(left.group()):
        gap = gap.removeprefix(".")
    return gap.strip() in ("", "&") and not _POSSESSIVE.search(left.group())


def _belongs_to_name(word: _Word, opened: bool) -> bool:
    text = word.group()
    if not (text[0].isupper() or any(map(str.isdigit, text))):
        return opened and text in _CONNECTORS
    # Inside a run a capital is enough (Theresa May, World War I); at its start `The`, `Did` or `I` open a sentence, but
    # `A.` is an initial and `US` no pronoun.
    initial = len(text) == 1 and word.string[word.end() : word.end() + 1] == "."
    return opened or initial or (len(text) > 1 and text.isupper()) or not _is_stop(text)


def _counts(text: str) -> bool:
    return text[0].isupper() and text.casefold() not in _MONTHS


def _is_stop(text: str) -> bool:
    return text.casefold() in STOP_WORDS or _CONTRACTED.sub("", text.casefold()) in STOP_WORDS


def _span(question: str, run: list[_Word]) -> str:
    return _POSSESSIVE.sub("", question[run[0].start() : run[-1].end()])
