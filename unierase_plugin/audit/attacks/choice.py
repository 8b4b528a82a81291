"""Multiple choice: the true answer among three that are not, in all four places."""

from __future__ import annotations

import random

import torch

from ...evaluation.generate import pad_token_id
from ...evaluation.metrics import words
from ...locate_then_edit.trace import pad, run_blocks, token_batches
from ..ask import BATCH_TOKENS, answer_ids, ask
from ..contract import Attack, AttackResult, Audited, Context, Fact, Measure

LETTERS = "ABCD"


def run(subject: Audited, context: Context) -> AttackResult:
    """The letter that is likeliest among the four; a fact's value is its share of right choices over four orders.

    Four orders, each answer once in each place, take out a model's liking for a letter: without knowledge it gets 1/4.
    """
    asks, orders = [], []
    for fact in context.facts:
        options = [fact.answer, *wrong_answers(fact, context)]
        for turn in range(len(LETTERS)):
            order = options[-turn:] + options[:-turn]
            lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, order, strict=True))
            text = f"{fact.question}\n{lines}\nAnswer with one letter."
            asks.append(ask(subject, context, text, prefill="The answer is"))
            orders.append(turn)
    chosen = _likeliest(subject, context, [each.ids for each in asks])
    hits = [float(letter == turn) for letter, turn in zip(chosen, orders, strict=True)]
    shares = tuple(sum(hits[i : i + 4]) / 4 for i in range(0, len(hits), 4))
    said = tuple(LETTERS[letter] for letter in chosen[::4])
    chance = ((0.25,) * len(shares),)
    return AttackResult((Measure("likeliest letter", shares, chance, tuple(each.text for each in asks[::4]), said),))


def wrong_answers(fact: Fact, context: Context) -> list[str]:
    """Three answers that are not true: the data's own, else those of the facts whose questions are most alike."""
    asked = set(words(fact.question))

    def likeness(other: Fact) -> float:
        theirs = set(words(other.question))
        return len(asked & theirs) / len(asked | theirs)

    pool = [other for other in (*context.kept, *context.facts) if other != fact]
    random.Random(f"{context.seed}\0{fact.question}").shuffle(pool)
    alike = [other.answer for other in sorted(pool, key=likeness, reverse=True)]
    distinct = dict.fromkeys(text for text in (*fact.wrong, *alike) if text.casefold() != fact.answer.casefold())
    return list(distinct)[: len(LETTERS) - 1]


@torch.no_grad()
def _likeliest(subject: Audited, context: Context, prompts: list[tuple[int, ...]]) -> list[int]:
    """Index of the likeliest letter after each prompt."""
    arch, pad_id = subject.arch, pad_token_id(subject.model, subject.tokenizer)
    letters = torch.tensor([answer_ids(subject, context, letter, prefill=True)[-1] for letter in LETTERS])
    chosen = [0] * len(prompts)
    done = 0
    for rows in token_batches(prompts, BATCH_TOKENS):
        batch = pad([prompts[row] for row in rows], pad_id, "right", arch.device)
        at = torch.tensor([len(prompts[row]) - 1 for row in rows])
        logits = run_blocks(arch, batch, head_at=(torch.arange(len(rows)), at)).logits
        for row, best in zip(rows, logits[:, letters.to(logits.device)].argmax(-1).tolist(), strict=True):
            chosen[row] = best
        done += len(rows)
        context.progress(done / len(prompts))
    return chosen


CHOICE = Attack(
    "multiple-choice", "words", "Which of four answers is the true one?", "four short passes a fact, nothing generated",
    run, needs_reference=True,
    unfit=lambda context: (
        "" if all(len(wrong_answers(fact, context)) == 3 for fact in context.facts)
        else "it needs three other answers for each fact"
    ),
)  # fmt: skip
