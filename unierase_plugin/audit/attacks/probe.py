"""A linear probe at every block: do the hidden states tell the true answer from wrong ones?

The model reads each question with its true answer and with three wrong ones. A ridge regression is fitted to a block's
states on the kept facts, averaged over the answer's tokens. It then names the likeliest of the four answers of each
forgotten fact, as the latent-knowledge probes of Lynch et al. 2024 (arXiv 2402.16835) do. The mean of the four is
subtracted from the states, so that the question itself tells nothing. The control is that of Hewitt and Liang (2019):
the same probes, fitted to answers that are called true at random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from ...facts.request import ForgetRequest
from ...models.generate import pad_token_id
from ...models.prefix import cache_prefixes, continue_from
from ...models.trace import run_blocks, token_batches
from ..asking import batch_tokens
from ..contract import AttackResult, Audited, Context, Measure
from ..prompts import answer_ids, prompt_for
from .choice import wrong_answers

#: A probe needs at least so many kept facts. The block is chosen by cross-validation in so many parts.
LEAST_KEPT, FOLDS = 20, 4
#: Ridge term, as a share of the mean squared length of a state.
RIDGE = 0.1
#: Probes fitted to random labels.
DRAWS = 5


def run(subject: Audited, context: Context) -> AttackResult:
    """A fact's value: whether the probe of the block that is best on kept facts names the true answer."""
    states = candidate_states(subject, context, (*context.kept, *context.facts))
    count = len(context.kept)
    blocks = range(states.shape[2])
    truth = torch.zeros(count, dtype=torch.long)
    draw = random.Random(context.seed)
    wrong = [torch.tensor([draw.randrange(states.shape[1]) for _ in range(count)]) for _ in range(DRAWS)]
    known = [cross_validated(states[:count, :, block], truth) for block in blocks]
    best = max(blocks, key=known.__getitem__)
    found = [named(states[:count, :, block], truth, states[count:, :, block]) for block in blocks]
    chance = [named(states[:count, :, best], labels, states[count:, :, best]) for labels in wrong]
    return AttackResult(
        (Measure("the block that tells kept facts best", _hits(found[best]), tuple(map(_hits, chance))),),
        figures={
            "share_by_block": {
                "forgotten facts": [float((each == 0).float().mean()) for each in found],
                "kept facts, those left out of the fit": known,
            },
            "block": best,
        },
    )


def _hits(chosen: Tensor) -> tuple[float, ...]:
    return tuple((chosen == 0).float().tolist())


@torch.no_grad()
def candidate_states(subject: Audited, context: Context, facts: Sequence[ForgetRequest]) -> Tensor:
    """(facts, 4, blocks, d) mean states over each answer's tokens, the true answer first, relative to their mean."""
    arch, pad_id = subject.arch, pad_token_id(subject.model, subject.tokenizer)
    blocks = range(len(arch.blocks))
    asked = [prompt_for(subject, context, fact.question).ids for fact in facts]
    said = [
        [answer_ids(subject, context, text) for text in (fact.answer, *wrong_answers(fact, context))] for fact in facts
    ]
    out = torch.zeros(len(facts), len(said[0]), len(blocks), arch.hidden_size)
    longest = [ids + max(four, key=len) for ids, four in zip(map(list, asked), said, strict=True)]
    done = 0
    for rows in token_batches(longest, batch_tokens(subject) // len(said[0])):
        # The answers of a question share its cache.
        prefix = cache_prefixes(arch, [asked[row] for row in rows], pad_id)
        four = repeat(torch.arange(len(rows)), "fact -> (fact answer)", answer=len(said[0]))
        prefix = prefix.select(four)
        suffix = continue_from(prefix, [ids for row in rows for ids in said[row]], pad_id)
        seen = run_blocks(arch, suffix, cache=prefix.fresh(), outputs_of=blocks, last=blocks[-1]).outputs
        real = suffix.mask[:, -suffix.ids.shape[1] :, None]
        for block, states in seen.items():
            mean = (states.float() * real.to(states.device)).sum(1) / real.sum(1).to(states.device)
            out[rows, :, block] = rearrange(mean, "(fact answer) d -> fact answer d", fact=len(rows)).cpu()
        done += len(rows)
        context.progress(done / len(facts))
    return out - out.mean(1, keepdim=True)


def cross_validated(states: Tensor, truth: Tensor) -> float:
    """Share of questions whose true answer is named by a probe fitted to the others, in FOLDS parts."""
    part = torch.arange(len(states)) % FOLDS
    hits = [
        (named(states[part != fold], truth[part != fold], states[part == fold]) == truth[part == fold]).float()
        for fold in range(FOLDS)
    ]
    return float(torch.cat(hits).mean())


def named(states: Tensor, truth: Tensor, asked: Tensor) -> Tensor:
    """(asked,) candidate that a ridge regression fitted to (n, 4, d) states, with truth (n,), puts first in (q, 4, d).

    The regression is solved in its dual form, with 4 n unknowns. Each coordinate is divided by its own deviation, since
    a few large coordinates would otherwise decide alone.
    """
    rows = "fact answer d -> (fact answer) d"
    scale = rearrange(states, rows).std(0).clamp(min=1e-6)
    own, theirs = rearrange(states / scale, rows), rearrange(asked / scale, rows)
    labels = torch.zeros(states.shape[:2]).scatter(1, truth[:, None], 1.0) - 1 / states.shape[1]
    gram = own @ own.T
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram + ridge, rearrange(labels, "fact answer -> (fact answer)"))
    scores: Tensor = rearrange(theirs @ (own.T @ weights), "(fact answer) -> fact answer", fact=len(asked))
    return scores.argmax(1)


def unfit(context: Context) -> str:
    """Why no probe can be fitted to these facts; empty where one can."""
    if len(context.kept) < LEAST_KEPT:
        return f"it needs {LEAST_KEPT} facts to keep: give more by --retain, or --full, which looks at more of them"
    few = any(len(wrong_answers(fact, context)) < 3 for fact in (*context.facts, *context.kept))
    return "it needs three other answers for each fact" if few else ""
