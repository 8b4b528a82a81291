"""How a scored answer follows its question: the text between them, the end of the turn, and the tokens.

TOFU's numbers depend on it: on which tokens are scored, and on how many the log-likelihood is averaged over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UniEraseError, reason, shown
from ..models.chat_templates import templated
from ..models.literal import Rendered
from ..models.loading import tokenizer_place
from ..models.prompts import begun, has_chat_template
from ..storage.inputs import no_folder

#: Stands for an answer while the end of a turn is looked up. No template contains it.
MARK = "unlearning"


class Context(Rendered):
    """A prompt that keeps the white space at its end.

    By `rstrip`, lm-eval moves white space to the scored part, and the last line break of a chat template would be
    scored as part of the answer.
    """

    def rstrip(self, characters: str | None = None, /) -> str:
        return self

    def __add__(self, scored: str, /) -> str:
        """Joins both, and the spans that users wrote: lm-eval tokenises a prompt and the scored part as one text."""
        later = scored.spans if isinstance(scored, Rendered) else ()
        moved = ((start + len(self), end + len(self)) for start, end in later)
        return Rendered.of(str(self) + str(scored), (*self.spans, *moved))


class Watched(Rendered):
    """A scored text for which our model type says of every token whether it is the most likely one."""


@dataclass(frozen=True)
class AnswerForm:
    """Turns an answer into the text that is scored after a prompt, and tokenises it as lm-eval does."""

    #: The text between a prompt and an answer.
    before: str
    #: The text that ends an answer: the template's end of a turn, and the end token if that is not its last one.
    after: str
    encode: Callable[[str], list[int]]
    tokenize: Callable[[str], list[str]]
    #: Special tokens. Some model types of lm-eval leave them in generations.
    specials: tuple[str, ...]

    def scored(self, answer: str) -> Rendered:
        start = len(self.before)
        return Rendered.of(f"{self.before}{answer}{self.after}", [(start, start + len(answer))])

    def without_specials(self, generated: str) -> str:
        for special in self.specials:
            generated = generated.replace(special, "")
        return generated


def answer_form(model: Any, tokenizer: Any, chat: bool, end_counts: bool = True) -> AnswerForm:
    """The form of answers for a tokenizer.

    model: lm-eval's model if it is known; its own encoding is then used. chat: whether prompts come from the
    tokenizer's chat template. end_counts: whether the end of the answer is scored too, as TOFU does.
    Raises UniEraseError if a chat template is wanted and there is none.
    """
    encode = getattr(model, "tok_encode", None) or (lambda text: begun(tokenizer, text))
    after = ""
    if end_counts:
        after = end_of_turn(tokenizer) if chat else ""
        end = tokenizer.eos_token or ""
        after += "" if after.endswith(end) else end
    specials = tuple(tokenizer.all_special_tokens)
    return AnswerForm(
        before="" if chat else " ", after=after, encode=encode, tokenize=tokenizer.tokenize, specials=specials
    )


def end_of_turn(tokenizer: Any) -> str:
    """The text that a chat template writes after an answer, such as `<|im_end|>` and a line break."""
    if not has_chat_template(tokenizer):
        raise UniEraseError(
            f"The tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template. Leave "
            "--apply_chat_template out (with `unierase eval`: --apply_chat_template false) to ask in plain text."
        )
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    text = templated(tokenizer, turns, add_generation_prompt=False)
    if MARK not in text:
        raise UniEraseError("The chat template leaves the assistant's answer out, so no answer can be scored in it.")
    return text.rpartition(MARK)[2]


def named_tokenizer(settings: Mapping[str, Any]) -> Any:
    """The tokenizer that lm-eval's model arguments name: `tokenizer`, else `pretrained`. lm-eval gives them to tasks.

    Raises UniEraseError if none is named, or if it cannot be loaded.
    """
    name = settings.get("tokenizer") or settings.get("pretrained")
    if not isinstance(name, str):
        raise UniEraseError(
            "No tokenizer is named, so the tokens of the answers cannot be counted. Give its folder or hub id: "
            """--metadata '{"tokenizer": "DIR"}'."""
        )
    options = {key: settings[key] for key in ("revision", "trust_remote_code", "subfolder") if settings.get(key)}
    problem = f"The tokenizer {shown(name)} cannot be loaded, and without it the answers' tokens cannot be counted."
    remedy = """Give a folder or hub id that holds one: --metadata '{"tokenizer": "DIR"}'"""
    return loaded_tokenizer(name, problem, remedy, **options)


def loaded_tokenizer(name: str, problem: str, remedy: str, **options: Any) -> Any:
    """The tokenizer of a folder or hub id.

    options: of transformers' `from_pretrained`.
    Raises UniEraseError, which says the problem and the remedy, where it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer_place(name), **options)
    except UniEraseError:
        raise
    except Exception as error:
        # The hub client raises its own kinds, those of requests or httpx, OSError and ValueError, by version.
        raise UniEraseError(f"{problem} {no_folder(name)}{remedy} ({reason(error)}).") from error
