"""Asks an audited model for the facts, and judges what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import repeat

from ..evaluation.answers import gives_answer
from ..evaluation.metrics import folded, words
from ..facts.request import ForgetRequest
from ..models.earlier import keeps_plain_layers
from ..models.generate import decode_answer, generate, pad_token_id
from ..models.trace import TokenBatch, pad, run_blocks, token_batches
from .contract import Audited, Context, Measure, Value
from .prompts import Prompt, answer_ids

#: Padded tokens of a batch at most, with generated ones, on a CPU and on a GPU.
BATCH_TOKENS, GPU_BATCH_TOKENS = 8192, 65536
#: Each output is also judged against the answers of this many other facts.
SHIFTS = 5

#: (fact, output) -> whether the fact's answer was given.
Judge = Callable[[ForgetRequest, str], Value]


def new_tokens(subject: Audited, context: Context) -> int:
    """How many tokens an answer may take."""
    return context.sizes.answers.tokens(len(answer_ids(subject, context, fact.answer)) for fact in context.facts)


@torch.no_grad()
def generate_answers(
    subject: Audited,
    context: Context,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    room: int = 0,
    progress: Callable[[float], None] = lambda share: None,
    **settings: Any,
) -> list[list[str]]:
    """Returns `samples` answers to each prompt. Temperature 0 is greedy. `settings` go to `models.generate.generate`.

    room: the most tokens of an answer; 0 for `new_tokens`. The samples of a prompt share its cache, if it holds keys
    and values alone. Special tokens other than the end stay in the text.
    """
    model, tokenizer = subject.model, subject.tokenizer
    room, pad_id = room or new_tokens(subject, context), pad_token_id(model, tokenizer)
    lengths = [[0] * (len(each.ids) + room) for each in prompts]
    out: list[list[str]] = [[] for _ in prompts]
    done = 0
    for rows in token_batches(lengths, max(1, batch_tokens(subject) // samples)):
        batch = pad([prompts[row].ids for row in rows], pad_id, "left", model.get_input_embeddings().weight.device)
        shared = _read(subject, batch, samples) if samples > 1 and keeps_plain_layers(model) else {}
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
        progress(done / len(prompts))
    return out


def _read(subject: Audited, batch: TokenBatch, samples: int) -> dict[str, Any]:
    """A cache of all but the last token of each prompt, repeated for each sample."""
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
    """The shifts between a fact and the other fact whose answer its output is judged against."""
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
    """The share of the words of two texts that occur in both, in [0, 1]."""
    own, theirs = set(words(one)), set(words(other))
    return len(own & theirs) / max(1, len(own | theirs))


def cleaned(context: Context, text: str) -> str:
    """The text without the unlearning token."""
    return " ".join((text.replace(context.token, " ") if context.token else text).split())


def ask_facts(
    subject: Audited,
    context: Context,
    name: str,
    prompts: Sequence[Prompt | None],
    *,
    judge: Judge = recovery,
    curve: tuple[str, int] | None = None,
    progress: Callable[[float], None] = lambda share: None,
    **settings: Any,
) -> Measure:
    """Asks for one greedy answer to each fact, and judges it.

    prompts: one for each fact, None for a fact that the attack does not apply to. curve: (line, steps) if the measure
    is a point of a curve.
    """
    chosen = [index for index, each in enumerate(prompts) if each is not None]
    said = generate_answers(
        subject, context, [each for each in prompts if each is not None], progress=progress, **settings
    )
    texts: list[str | None] = [None] * len(prompts)
    for index, text in zip(chosen, said, strict=True):
        texts[index] = text[0]

    def score(index: int, fact: ForgetRequest) -> Value:
        text = texts[index]
        return None if text is None else judge(fact, cleaned(context, text))

    return Measure(
        name=name,
        values=tuple(score(index, fact) for index, fact in enumerate(context.facts)),
        others=against_others(context.facts, score),
        prompts=tuple("" if each is None else each.text for each in prompts),
        texts=tuple("" if text is None else text for text in texts),
        curve=curve,
    )


def part(context: Context, index: int, count: int) -> Callable[[float], None]:
    """The progress function of the `index`-th of `count` equal parts."""
    return lambda share: context.progress((index + share) / count)
