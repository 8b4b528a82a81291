"""How an answer follows its question in what a model scores: the text between them, the end of the turn, the tokens.

TOFU's numbers depend on it: which tokens are scored, and over how many the log-likelihood is averaged.
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

#: Stands for an answer where the end of a turn is looked up; in no template.
MARK = "unlearning"


class Context(Rendered):
    """A prompt whose end is left to it. lm-eval moves white space at a prompt's end to the scored part, by `rstrip`;
    a chat template's last line break would be scored as if it were the answer's.
    """

    def rstrip(self, characters: str | None = None, /) -> str:
        return self

    def __add__(self, scored: str, /) -> str:
        """Both, and what users wrote in both: lm-eval tokenises a prompt and what is scored after it in one."""
        later = scored.spans if isinstance(scored, Rendered) else ()
        moved = ((start + len(self), end + len(self)) for start, end in later)
        return Rendered.of(str(self) + str(scored), (*self.spans, *moved))


class Watched(Rendered):
    """A scored text for which a model that can tells of every token whether it is the most likely one."""


@dataclass(frozen=True)
class AnswerForm:
    """Turns answers into what is scored after a prompt, and reads its tokens as lm-eval does."""

    #: What stands between a prompt and an answer.
    before: str
    #: What ends an answer: the template's end of a turn, and the end token where that is not its last one.
    after: str
    encode: Callable[[str], list[int]]
    tokenize: Callable[[str], list[str]]
    #: Special tokens, which some model types of lm-eval leave in generations and others do not.
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

    model: lm-eval's model where there is one at hand, whose own encoding then counts; `chat`: whether prompts come
    from the tokenizer's chat template; `end_counts`: whether the end of the answer is scored too, as TOFU does.
    Raises UniEraseError where a chat template is wanted and there is none.
    """
    encode = getattr(model, "tok_encode", None) or (lambda text: begun(tokenizer, text))
    after = ""
    if end_counts:
        after = end_of_turn(tokenizer) if chat else ""
        end = tokenizer.eos_token or ""
        after += "" if after.endswith(end) else end
    specials = tuple(tokenizer.all_special_tokens)
    return AnswerForm("" if chat else " ", after, encode, tokenizer.tokenize, specials)


def end_of_turn(tokenizer: Any) -> str:
    """What a chat template writes after an answer, such as `<|im_end|>` and a line break."""
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
    """The tokenizer that lm-eval's model arguments name, which it hands to tasks: `tokenizer`, else `pretrained`.

    Raises UniEraseError where none is named or it cannot be loaded.
    """
    name = settings.get("tokenizer") or settings.get("pretrained")
    if not isinstance(name, str):
        raise UniEraseError(
            "The answers' tokens cannot be counted, since no tokenizer is named. Give its folder or hub id: "
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
