"""Multiple choice: the true answer among three wrong ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ...evaluation.metrics import folded
from ...facts.request import ForgetRequest
from ...models.generate import pad_token_id
from ...models.trace import pad, run_blocks, token_batches
from ..asking import batch_tokens, likeness, part
from ..contract import AttackResult, Audited, Context, Measure
from ..prompts import Prompt, answer_ids, prompt_for
from .inside import force, geometric

LETTERS = "ABCD"
PREFILL = "The answer is"


def run(subject: Audited, context: Context) -> AttackResult:
    """The likeliest of four answers. A full audit also takes the likeliest letter, which is hard for small models."""
    options = [[fact.answer, *wrong_answers(fact, context)] for fact in context.facts]
    variants = [_by_likelihood, *([_by_letter] if context.sizes.every_variant else [])]
    found = []
    for index, variant in enumerate(variants):
        found.append(variant(subject, context, options))
        part(context, index, len(variants))(1.0)
    return AttackResult(tuple(found))


def unfit(context: Context) -> str:
    """Why the facts give no choice of four answers; empty where they do."""
    enough = all(len(wrong_answers(fact, context)) == 3 for fact in context.facts)
    return "" if enough else "it needs three other answers for each fact"


def _by_likelihood(subject: Audited, context: Context, options: Sequence[Sequence[str]]) -> Measure:
    """The answer with the greatest geometric mean probability a token."""
    prompts = [prompt_for(subject, context, fact.question, prefill=PREFILL) for fact in context.facts]
    texts = [text for each in options for text in each]
    repeated = [each for each in prompts for _ in LETTERS]
    forced = force(subject, repeated, [answer_ids(subject, context, text, prefill=True) for text in texts])
    likely = [geometric(each) for each in forced]
    best = [max(range(len(LETTERS)), key=likely[i : i + 4].__getitem__) for i in range(0, len(likely), 4)]
    said = tuple(each[index] for each, index in zip(options, best, strict=True))
    return _measure("likeliest answer", [float(index == 0) for index in best], prompts, said)


def _by_letter(subject: Audited, context: Context, options: Sequence[Sequence[str]]) -> Measure:
    """A fact's value is its share of right letters over four orders, each answer once in each place.

    Four orders cancel a model's preference for a letter: without knowledge it gets a quarter.
    """
    prompts = []
    for fact, four in zip(context.facts, options, strict=True):
        for turn in range(len(LETTERS)):
            order = [*four[-turn:], *four[:-turn]] if turn else four
            lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, order, strict=True))
            text = f"{fact.question}\n{lines}\nAnswer with one letter."
            prompts.append(prompt_for(subject, context, text, prefill=PREFILL))
    chosen = _likeliest_letter(subject, context, [each.ids for each in prompts])
    hits = [float(letter == index % 4) for index, letter in enumerate(chosen)]
    shares = [sum(hits[i : i + 4]) / 4 for i in range(0, len(hits), 4)]
    return _measure("likeliest letter", shares, prompts[::4], tuple(LETTERS[letter] for letter in chosen[::4]))


def _measure(name: str, shares: Sequence[float], prompts: Sequence[Prompt], said: tuple[str, ...]) -> Measure:
    return Measure(
        name=name,
        values=tuple(shares),
        others=((0.25,) * len(shares),),
        prompts=tuple(each.text for each in prompts),
        texts=said,
    )


def wrong_answers(fact: ForgetRequest, context: Context) -> list[str]:
    """Three wrong answers: those of the data, else the answers to the most similar questions."""
    pool = [
        other
        for other in (*context.kept, *context.facts)
        if (other.question, other.answer) != (fact.question, fact.answer)
    ]
    random.Random(f"{context.seed}\0{fact.question}").shuffle(pool)
    alike = [other.answer for other in sorted(pool, key=lambda other: -likeness(fact.question, other.question))]
    distinct = {folded(fact.answer): ""}
    for text in (*fact.wrong_answers, *alike):
        distinct.setdefault(folded(text), text)
    return list(distinct.values())[1 : len(LETTERS)]


@torch.no_grad()
def _likeliest_letter(subject: Audited, context: Context, prompts: list[tuple[int, ...]]) -> list[int]:
    """Index of the likeliest letter after each prompt."""
    arch, pad_id = subject.arch, pad_token_id(subject.model, subject.tokenizer)
    letters = torch.tensor([answer_ids(subject, context, letter, prefill=True)[-1] for letter in LETTERS])
    chosen = [0] * len(prompts)
    for rows in token_batches(prompts, batch_tokens(subject)):
        batch = pad([prompts[row] for row in rows], pad_id, "right", arch.device)
        at = torch.tensor([len(prompts[row]) - 1 for row in rows])
        logits = run_blocks(arch, batch, head_at=(torch.arange(len(rows)), at)).logits
        for row, best in zip(rows, logits[:, letters.to(logits.device)].argmax(-1).tolist(), strict=True):
            chosen[row] = best
    return chosen
