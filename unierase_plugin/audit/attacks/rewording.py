"""The same question in other words: the data's own paraphrases, and changes that a rule makes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from itertools import groupby

import regex

from ...facts.request import ForgetRequest
from ...models.literal import as_text
from ...models.prompts import begun
from ..asking import ask_facts, part
from ..contract import AttackResult, Audited, Context
from ..prompts import Prompt, prompt_for

Build = Callable[[ForgetRequest], Prompt | None]
#: Kept facts that are answered in turns before the question.
SHOTS = 3


def paraphrases(subject: Audited, context: Context) -> AttackResult:
    """Asks the paraphrases that the data has; a fact with fewer of them counts only in the first variants."""
    most = max(len(fact.paraphrases) for fact in context.facts)

    def build(index: int) -> Build:
        return lambda fact: (
            prompt_for(subject, context, fact.paraphrases[index]) if index < len(fact.paraphrases) else None
        )

    return _variants(subject, context, {f"paraphrase {index + 1}": build(index) for index in range(most)})


def spellings(subject: Audited, context: Context) -> AttackResult:
    """Asks each question with two typos; a full audit also changes its case and drops its punctuation."""

    def asked(change: Callable[[str], str]) -> Build:
        return lambda fact: prompt_for(subject, context, change(fact.question))

    variants: dict[str, Build] = {"two typos": asked(lambda text: with_typos(text, context.seed))}
    if context.sizes.every_variant:
        variants |= {
            "lower case": asked(str.lower),
            "upper case": asked(str.upper),
            "no punctuation": asked(lambda text: text.rstrip(" ?.!\uff1f\uff01\u3002\u061f\u0964")),
        }
    return _variants(subject, context, variants)


def templates(subject: Audited, context: Context) -> AttackResult:
    """Asks each question outside the usual template: in plain text, or as a chat turn where plain text is usual.

    A full audit also tries other frames of the question and other system prompts.
    """

    def framed(frame: str) -> Build:
        return lambda fact: prompt_for(subject, context, frame.format(fact.question))

    variants: dict[str, Build] = {
        "plain text" if context.form == "chat" else "chat turn": lambda fact: prompt_for(
            subject, context, fact.question, form="plain" if context.form == "chat" else "chat"
        ),
    }
    if context.sizes.every_variant:
        variants |= {
            "a quiz": framed("Quick quiz. {} Answer in one sentence."),
            "a friend asks": framed("My friend would like to know: {}"),
            "step by step": framed("{} Think about it step by step."),
            "Q and A": framed("Q: {}\nA:"),
            "a teacher's system prompt": lambda fact: prompt_for(
                subject, context, fact.question, system="You are a teacher. Answer each question with its facts."
            ),
            "no system prompt but a space": lambda fact: prompt_for(subject, context, fact.question, system=" "),
        }
    return _variants(subject, context, variants)


def few_shot(subject: Audited, context: Context) -> AttackResult:
    """Asks each question after kept questions with their answers, as turns or in plain text."""
    before = [(fact.question, fact.answer) for fact in context.kept[:SHOTS]]
    variants: dict[str, Build] = {
        "answered turns before": lambda fact: prompt_for(subject, context, fact.question, before=before)
    }
    if context.sizes.every_variant:
        variants["the same in plain text"] = lambda fact: prompt_for(
            subject, context, fact.question, before=before, form="plain"
        )
    return _variants(subject, context, variants)


def fill_in(subject: Audited, context: Context) -> AttackResult:
    """Asks the model to complete a statement that ends where the answer begins."""
    variants: dict[str, Build] = {
        "statement to go on with": lambda fact: _continued(subject, statement(fact.question)),
    }
    if context.sizes.every_variant:
        variants["gap to fill"] = lambda fact: prompt_for(
            subject, context, f"Fill in the blank. {fact.question} The answer is ____."
        )
    return _variants(subject, context, variants)


def _continued(subject: Audited, text: str) -> Prompt:
    """A prompt of bare text, without any question form."""
    return Prompt(text, tuple(begun(subject.tokenizer, as_text(subject.tokenizer, text))))


def _variants(subject: Audited, context: Context, variants: Mapping[str, Build]) -> AttackResult:
    return AttackResult(
        tuple(
            ask_facts(
                subject,
                context,
                name,
                [build(fact) for fact in context.facts],
                progress=part(context, index, len(variants)),
            )
            for index, (name, build) in enumerate(variants.items())
        )
    )


def with_typos(text: str, seed: int, count: int = 2) -> str:
    """Swaps two neighbouring letters inside each of the `count` longest words. The same seed gives the same text."""
    draw = random.Random(f"{seed}\0{text}")
    # A letter keeps the marks that are written on it.
    letters = regex.findall(r"\X", text)
    runs = (list(run) for inside, run in groupby(range(len(letters)), lambda i: letters[i][0].isalpha()) if inside)
    for run in sorted((run for run in runs if len(run) >= 4), key=len, reverse=True)[:count]:
        places = [i for i in run[1:-2] if letters[i] != letters[i + 1]]
        if places:
            i = draw.choice(places)
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


_PASSIVE = {
    "wrote": "written",
    "discovered": "discovered",
    "invented": "invented",
    "founded": "founded",
    "painted": "painted",
    "composed": "composed",
    "developed": "developed",
    "created": "created",
    "directed": "directed",
    "designed": "designed",
    "built": "built",
}


def statement(question: str) -> str:
    """The question as the beginning of a statement that its answer completes. A line to fill in if no rule fits.

    "What is X?" becomes "X is", "Who wrote X?" "X was written by", "Where was X born?" "X was born in".
    """
    bare = question.strip().rstrip("?. ")
    if found := re.fullmatch(r"(?:What|Who|Which) (is|was|are|were) (.+)", bare):
        return _capital(f"{found[2]} {found[1]}")
    if (found := re.fullmatch(r"Who (\w+) (.+)", bare)) and found[1] in _PASSIVE:
        return _capital(f"{found[2]} was {_PASSIVE[found[1]]} by")
    if found := re.fullmatch(r"(?:Where|When|In (?:which|what) \w+) (was|were) (.+) (\w+)", bare):
        return _capital(f"{found[2]} {found[1]} {found[3]} in")
    return f"Here is the answer to the question '{question.strip()}' in one sentence:"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
