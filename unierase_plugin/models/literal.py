"""Reads texts of users as plain text: the name of a special token in a question or answer is not that token.

A tokenizer finds its special tokens in any text, so a question about `<|im_end|>` would end its own turn. Here only the
tokens that the chat template itself writes are special tokens. Their names in a user's text are tokenised like any
other text. A text without such a name is tokenised by the tokenizer itself.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, first_words, listed

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

Span = tuple[int, int]

#: The first private letters: those that stand for special tokens, and those that stand for a user's text.
_NAMES, _PARTS = 0xF0000, 0x10FF00
#: How such names are read here.
READ = (
    "They are read as text there, not as the tokens; a program that gives these texts to the tokenizer as they are "
    "reads the tokens."
)
#: The tokenizer's attribute that keeps what this module builds from it. It is rebuilt after a token was added.
_KEPT = "_unierase_literal"


class Rendered(str):
    """A prompt, and the spans in it that users wrote. In these spans, names of special tokens are plain text."""

    spans: tuple[Span, ...] = ()

    @classmethod
    def of(cls, text: str, spans: Iterable[Span]) -> Self:
        found = cls(text)
        found.spans = tuple(spans)
        return found


def special_names(tokenizer: Any, text: str) -> tuple[str, ...]:
    """The special tokens whose names occur in a text, in the order of the vocabulary."""
    return tuple(name for name in _Literal.of(tokenizer).names if name in text)


def rendered(tokenizer: Any, write: Callable[[Sequence[str]], str], parts: Sequence[str]) -> str:
    """The prompt that `write` makes of a user's texts; `Rendered` if one of them has the name of a special token.

    `write` may put anything around the texts and strip white space from their ends. Raises RequestError if it changes
    more.
    """
    text = write(parts)
    if not any(special_names(tokenizer, part) for part in parts):
        return text
    found = spanned(write, parts)
    if found is None:
        raise RequestError(
            f"The chat template changes {first_words(parts[-1])}, which has the name of a special token, so that it "
            "cannot be told from the template's own. Write the name in another way, or leave the fact out."
        )
    return found


def spanned(write: Callable[[Sequence[str]], str], parts: Sequence[str]) -> Rendered | None:
    """The prompt that `write` makes of a user's texts, and their spans in it; None if it changes them."""
    text = write(parts)
    marks = [chr(_PARTS + index) for index in range(len(parts))]
    around = re.split("|".join(marks), write(marks))
    for cut in (str, str.strip):
        given = [cut(part) for part in parts]
        if len(around) == len(parts) + 1 and _joined(around, given) == text:
            starts = [len(_joined(around[: at + 1], given[:at])) for at in range(len(given))]
            return Rendered.of(text, ((start, start + len(part)) for start, part in zip(starts, given, strict=True)))
    return None


def names_in_spans(tokenizer: Any, text: str) -> bool:
    """Whether a user's text in the prompt has the name of a special token. A prompt without spans has none."""
    spans = text.spans if isinstance(text, Rendered) else ()
    return any(special_names(tokenizer, text[start:end]) for start, end in spans)


def _joined(around: Sequence[str], parts: Sequence[str]) -> str:
    return "".join(
        piece for at, text in enumerate(around) for piece in (text, *([parts[at]] if at < len(parts) else []))
    )


def as_text(tokenizer: Any, text: str) -> str:
    """The text itself; `Rendered` as a whole if it has the name of a special token."""
    return Rendered.of(text, [(0, len(text))]) if special_names(tokenizer, text) else text


def literal_ids(tokenizer: Any, text: str, add_special_tokens: bool = False) -> tuple[list[int], list[Span]]:
    """Token ids of a text, and the characters of each token; [] for the characters if the tokenizer has no offsets."""
    if isinstance(text, Rendered):
        return _Literal.of(tokenizer).encode(text, add_special_tokens)
    told = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=told)
    return list(found["input_ids"]), [(start, end) for start, end in found["offset_mapping"]] if told else []


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's text, such as an answer, without the tokens that the tokenizer adds before and after."""
    return literal_ids(tokenizer, as_text(tokenizer, text))[0]


def tell_special_names(tokenizer: Any, facts: Iterable[Any], more: Sequence[str] = (), read: str = READ) -> None:
    """Logs that facts (requests, or an audit's) have names of special tokens, or one of `more`, as text.

    read   how these texts are read, in a sentence or two
    """
    found: dict[str, str] = {}
    count = 0
    for fact in facts:
        texts = "\0".join(filter(None, (fact.question, fact.answer, getattr(fact, "target", None))))
        names = [*special_names(tokenizer, texts), *(name for name in more if name and name in texts)]
        count += bool(names)
        for name in dict.fromkeys(names):
            found.setdefault(name, fact.label)
    if found:
        logger.warning(
            "Facts with names of special tokens in their texts (%s): %d, such as %s. %s",
            listed(found),
            count,
            next(iter(found.values())),
            read,
        )


class _Literal:
    """The special tokens of a tokenizer, and a copy of it that knows them only by private letters."""

    def __init__(self, tokenizer: Any) -> None:
        self.size = len(tokenizer)
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        # A token that matches only as a whole word is left to the tokenizer: whether it matches is not visible here.
        self.names = tuple(
            token.content for token in added if token.special and not token.single_word and token.content.strip()
        )
        self._letters = {name: chr(_NAMES + index) * len(name) for index, name in enumerate(self.names)}
        self._copy: Any = None

    @classmethod
    def of(cls, tokenizer: Any) -> _Literal:
        kept = vars(tokenizer).get(_KEPT)
        if not isinstance(kept, cls) or kept.size != len(tokenizer) or kept.tokenizer is not tokenizer:
            kept = cls(tokenizer)
            vars(tokenizer)[_KEPT] = kept
        return kept

    def encode(self, text: Rendered, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
        if self._copy is None:
            self._copy = self._make_copy()
        found = self._copy.encode(self._lettered(text), add_special_tokens=add_special_tokens)
        return list(found.ids), list(found.offsets)

    def _lettered(self, text: Rendered) -> str:
        """The prompt. Special tokens outside the user's spans become as many private letters, so that offsets stay."""
        pattern = re.compile("|".join(map(re.escape, sorted(self.names, key=len, reverse=True))))
        pieces, at = [], 0
        for start, end in (*text.spans, (len(text), len(text))):
            pieces += [pattern.sub(lambda found: self._letters[found[0]], text[at:start]), text[start:end]]
            at = end
        return "".join(pieces)

    def _make_copy(self) -> Any:
        """The same tokenizer (vocabulary, merges, numbers), except for the names of its special tokens."""
        from tokenizers import Tokenizer

        if not getattr(self.tokenizer, "is_fast", False):
            raise RequestError(
                f"{type(self.tokenizer).__name__} cannot read the name of a special token as text. Load the tokenizer "
                "with use_fast=True, or leave the facts out that have such names."
            )
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in rules["added_tokens"]:
            token["content"] = self._letters.get(token["content"], token["content"])
        model = rules["model"]
        words = model.get("vocab")
        if isinstance(words, dict):
            model["vocab"] = {self._letters.get(word, word): index for word, index in words.items()}
        elif isinstance(words, list):
            model["vocab"] = [[self._letters.get(word, word), score] for word, score in words]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._letters.get(model["unk_token"], model["unk_token"])
        copy = Tokenizer.from_str(json.dumps(rules))
        copy.no_truncation()
        copy.no_padding()
        return copy
