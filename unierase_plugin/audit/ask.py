"""Asks a model in every form that the attacks need, and judges what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat

from ..evaluation.answers import gives_answer
from ..evaluation.metrics import folded, words
from ..facts.request import ForgetRequest
from ..models.chat_templates import refusal
from ..models.generate import decode_answer, generate, pad_token_id
from ..models.literal import literal_ids, rendered, text_ids
from ..models.prompts import answer_text, begun, has_chat_template
from ..models.trace import TokenBatch, pad, run_blocks, token_batches
from .contract import Audited, Context, Measure, Value

#: Padded tokens of a batch at most, generated ones included, on a CPU and on a GPU.
BATCH_TOKENS, GPU_BATCH_TOKENS = 8192, 65536
#: How many other facts' answers each output is judged against too.
SHIFTS = 5

Turns = Sequence[tuple[str, str]]
#: (fact, output) -> whether the fact's answer was given.
Judge = Callable[[ForgetRequest, str], Value]


@dataclass(frozen=True)
class Ask:
    """One prompt: its text, for the examples, and its token ids."""

    text: str
    ids: tuple[int, ...]


def ask(
    subject: Audited,
    context: Context,
    question: str,
    *,
    prefill: str = "",
    system: str = "",
    before: Turns = (),
    form: str = "",
    then: Sequence[int] = (),
) -> Ask:
    """A question as it reaches the model, up to where the answer begins.

    prefill  text that the answer already begins with, no space before it
    system   a system prompt; put before the question where the chat template knows none
    before   earlier (question, answer) turns
    form     "chat" or "plain"; the context's when left out
    then     token ids put after all this
    """
    tokenizer = subject.tokenizer
    chat = (form or context.form) == "chat" and has_chat_template(tokenizer)

    def write(parts: Sequence[str]) -> str:
        said = parts[: 2 * len(before) + 1]
        turns = [{"role": _ROLES[index % 2], "content": text} for index, text in enumerate(said)]
        begun_with = "".join(parts[len(said) :])
        if chat:
            return _templated(tokenizer, turns, system, context.template_kwargs) + begun_with
        text = _written_out([*([{"role": "user", "content": system}] if system else []), *turns])
        return text + (f" {begun_with}" if begun_with else "")

    parts = [*(text for pair in before for text in pair), question, *([prefill] if prefill else [])]
    text = rendered(tokenizer, write, parts)
    ids = literal_ids(tokenizer, text)[0] if chat else begun(tokenizer, text)
    shown = text + (str(tokenizer.decode(list(then))) if then else "")
    return Ask(shown, (*ids, *then))


_ROLES = ("user", "assistant")


def _templated(tokenizer: Any, turns: list[dict[str, str]], system: str, settings: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    first = [{"role": "system", "content": system}] if system else []
    try:
        text = tokenizer.apply_chat_template(
            [*first, *turns], tokenize=False, add_generation_prompt=True, **dict(settings)
        )
    except TemplateError as error:  # Gemma's, for one, knows no system turn
        if not system:
            raise refusal(tokenizer, error) from error
        merged = [{**turns[0], "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]
        return _templated(tokenizer, merged, "", settings)
    return str(text)


def _written_out(turns: list[dict[str, str]]) -> str:
    """The plain form of a conversation, as `positions.PLAIN_FORM` writes one question."""
    marks = {"user": "Question: {}\n", "assistant": "Answer: {}\n\n"}
    return "".join(marks[turn["role"]].format(turn["content"]) for turn in turns) + "Answer:"


def answer_ids(subject: Audited, context: Context, answer: str, prefill: bool = False) -> list[int]:
    """Token ids of an answer as it follows a prompt: with a space before it wherever text stands before it."""
    text = answer_text(subject.tokenizer, answer, "bare" if prefill else context.form)
    return text_ids(subject.tokenizer, text)


def new_tokens(subject: Audited, context: Context) -> int:
    """How many tokens an answer may take."""
    return context.sizes.answers.tokens(len(answer_ids(subject, context, fact.answer)) for fact in context.facts)


@torch.no_grad()
def say(
    subject: Audited,
    context: Context,
    asks: Sequence[Ask],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    progress: Callable[[float], None] = lambda share: None,
    **settings: Any,
) -> list[list[str]]:
    """`samples` answers to each prompt, greedy at temperature 0; `settings` go to `generate`.

    What a prompt is read into is shared by its samples. Special tokens other than the end stay in the text.
    """
    model, tokenizer = subject.model, subject.tokenizer
    room, pad_id = new_tokens(subject, context), pad_token_id(model, tokenizer)
    lengths = [[0] * (len(each.ids) + room) for each in asks]
    out: list[list[str]] = [[] for _ in asks]
    done = 0
    for rows in token_batches(lengths, max(1, batch_tokens(subject) // samples)):
        batch = pad([asks[row].ids for row in rows], pad_id, "left", model.get_input_embeddings().weight.device)
        shared = _read(subject, batch, samples) if samples > 1 else {}
        ids, mask = (
            repeat(each, "prompt token -> (prompt sample) token", sample=samples) for each in (batch.ids, batch.mask)
        )
        written = generate(
            model,
            ids,
            mask,
            room,
            pad_id,
            temperature=temperature,
            **shared,
            **settings,
        )
        said = [decode_answer(model, tokenizer, ids, pad_id) for ids in written.tolist()]
        for place, row in enumerate(rows):
            out[row] = said[place * samples : (place + 1) * samples]
        done += len(rows)
        progress(done / len(asks))
    return out


def _read(subject: Audited, batch: TokenBatch, samples: int) -> dict[str, Any]:
    """A cache of all but the last token of each prompt, once for each of its samples."""
    from transformers import DynamicCache

    cache = DynamicCache(config=subject.model.config)
    before = TokenBatch(batch.ids[:, :-1], batch.mask[:, :-1], batch.positions[:, :-1])
    run_blocks(subject.arch, before, cache=cache, last=len(subject.arch.blocks) - 1)
    cache.batch_repeat_interleave(samples)
    return {"past_key_values": cache}


def batch_tokens(subject: Audited) -> int:
    """Padded tokens of a batch at most."""
    return BATCH_TOKENS if subject.arch.device.type == "cpu" else GPU_BATCH_TOKENS


def without_token(subject: Audited) -> dict[str, Any]:
    """Settings of `generate` that take the unlearning token's logit out of every step."""
    return {} if subject.token_id is None else {"suppress_tokens": [subject.token_id]}


def shuffles(n: int) -> range:
    """By how much the facts are shifted when an output is judged against another fact's answer."""
    return range(1, min(SHIFTS, n - 1) + 1)


def against_others(
    facts: Sequence[ForgetRequest], score: Callable[[int, ForgetRequest], Value]
) -> tuple[tuple[Value, ...], ...]:
    """(shifts, facts): `score(i, other fact)`; None where the other fact has the same answer, in any spelling."""
    n = len(facts)
    return tuple(
        tuple(
            None
            if folded(facts[(i + shift) % n].answer) == folded(facts[i].answer)
            else score(i, facts[(i + shift) % n])
            for i in range(n)
        )
        for shift in shuffles(n)
    )


def recovery(fact: ForgetRequest, text: str) -> Value:
    """1.0 where a text gives the answer (`evaluation.answers.gives_answer`), else 0.0."""
    return float(gives_answer(fact, text))


def likeness(one: str, other: str) -> float:
    """Share of the words of two texts that both have, in [0, 1]."""
    own, theirs = set(words(one)), set(words(other))
    return len(own & theirs) / max(1, len(own | theirs))


def cleaned(context: Context, text: str) -> str:
    """Without the unlearning token."""
    return " ".join((text.replace(context.token, " ") if context.token else text).split())


def tried(
    subject: Audited,
    context: Context,
    name: str,
    asks: Sequence[Ask | None],
    *,
    judge: Judge = recovery,
    curve: tuple[str, int] | None = None,
    progress: Callable[[float], None] = lambda share: None,
    **settings: Any,
) -> Measure:
    """One greedy answer a fact, judged; None among `asks` stands for facts that the attack does not apply to."""
    chosen = [index for index, each in enumerate(asks) if each is not None]
    said = say(subject, context, [each for each in asks if each is not None], progress=progress, **settings)
    texts: list[str | None] = [None] * len(asks)
    for index, text in zip(chosen, said, strict=True):
        texts[index] = text[0]

    def score(index: int, fact: ForgetRequest) -> Value:
        text = texts[index]
        return None if text is None else judge(fact, cleaned(context, text))

    return Measure(
        name,
        tuple(score(index, fact) for index, fact in enumerate(context.facts)),
        against_others(context.facts, score),
        tuple("" if each is None else each.text for each in asks),
        tuple("" if text is None else text for text in texts),
        curve,
    )


def part(context: Context, index: int, count: int) -> Callable[[float], None]:
    """Progress of the `index`-th of `count` equal parts."""
    return lambda share: context.progress((index + share) / count)
