"""The exceptions of the package, under one base class, and how their messages quote values and facts.

Every message quotes the value that was refused, what would have been accepted and what to do about it, so that catching
`UniEraseError` and printing it is enough for a command line.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

#: Characters of a value, and of another library's reason, that a message holds at most.
LONGEST_VALUE = 200
LONGEST_REASON = 300
#: Words, and characters, that a message tells of a fact at most.
FIRST_WORDS = 4
#: Names of a list that are told.
MOST_NAMES = 20
LONGEST_START = 40

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UniEraseError(Exception):
    """Base of every error that the package raises on purpose."""


class RequestError(UniEraseError):
    """A forget request, a set of them, or the file or name that they are read from is not usable."""


class HyperParamsError(UniEraseError):
    """A hyper-parameter is unknown, has the wrong type or lies outside its range."""


class ArchitectureError(UniEraseError):
    """The model lacks a part that the method needs, or the part is not where its structure says it should be."""


class TokenError(UniEraseError):
    """The unlearning token cannot be added, is not exactly one token, or was not learned."""


class EditError(UniEraseError):
    """A weight edit cannot be computed, applied or reverted."""


class TrainingError(UniEraseError):
    """Training diverged, or the memory does not hold it."""


class CheckpointError(UniEraseError):
    """An output folder is incomplete, does not match its manifest, or belongs to another model."""


class WriteError(CheckpointError):
    """A file or folder cannot be written: the disk is full, or the place does not allow it. The old state is there."""


class StepAppliedError(CheckpointError):
    """A folder that is to be replaced by its own next step has that step already."""


class DependencyError(UniEraseError):
    """A package that this feature needs is not installed, or its version does not fit."""


class PluginError(UniEraseError):
    """A method, reader, metric or host is not there, or two plugins claim its name."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `" Did you mean 'layers'?"`, or `""` when no known name is close.

    The leading space lets a message append the hint without asking whether there is one. Case is ignored, so that
    `Layers` finds `layers`.
    """
    by_folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""


def shown(value: object, most: int = LONGEST_VALUE) -> str:
    """The value as a message quotes it: as Python writes it, without its middle where that is longer than `most`.

    Control characters and half surrogate pairs come out as escapes. For what may hold facts there is `first_words`.
    """
    try:
        text = repr(value)
    except ValueError:  # more digits than Python turns into text
        return f"a {type(value).__name__} that is too large to be shown"
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail]}…{text[-tail:]} ({len(text)} characters)"


def first_words(text: object) -> str:
    """What a message says of a question, an answer or a prompt: its first words, quoted, and no more.

    Facts are told by their case_id, or by file and line; messages end up in logs that others read. Of a list or a
    mapping where a text was wanted, only the type is told.
    """
    if text is None or isinstance(text, (bool, int, float)) or (isinstance(text, str) and not text.strip()):
        return shown(text, LONGEST_START)
    if not isinstance(text, str):
        return f"a {type(text).__name__}"
    words = text.split(maxsplit=FIRST_WORDS)
    start = " ".join(words[:FIRST_WORDS])
    # Where no spaces part the words, one letter says as much as three.
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in start)
    most = LONGEST_START // 3 if wide else LONGEST_START
    whole = len(words) <= FIRST_WORDS and len(start) <= most
    return repr(text if whole and text == start else start[:most] + ("" if whole else " …"))


def listed(names: Iterable[object], most: int = MOST_NAMES) -> str:
    """Names as a message lists them: the first words of each, and how many there are beyond `most`.

    What a file calls its fields may hold facts too.
    """
    given = list(names)
    said = ", ".join(first_words(name)[1:-1] if isinstance(name, str) else shown(name) for name in given[:most])
    return said + (f" and {len(given) - most} more" if len(given) > most else "") or "none"


def visible(text: str) -> str:
    """The text with escapes in the place of what a terminal would obey or hide, line ends and tabs apart.

    Control characters, among them the escape that begins a control sequence; overrides of the writing direction; line
    ends other than the usual one; half surrogate pairs, which no terminal takes.
    """
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def reason(error: BaseException, most: int = LONGEST_REASON) -> str:
    """What another library's error says, in one line that is cut where it is long."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= most else f"{said[:most]}…"
