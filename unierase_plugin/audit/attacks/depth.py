"""Depth of unlearning: how much of the answer a model's hidden states still bring into the unedited model.

The Unlearning Depth Score (Lee, Kim and Jo 2026, "Measuring the Depth of LLM Unlearning via Activation Patching",
arXiv 2605.24614). Two models read the true answer after its question: a source, and the unedited model. At the
positions that predict the answer, the states of the source after a block replace those of the unedited model, which
goes on from there. S1 is the mean log-probability that a token of the answer loses in this way if the source is the
reference model, and S2 if the source is the model in question. A fact's score is

    UDS = sum_l S1_l clip(S2_l / S1_l, 0, 1) / sum_l S1_l      over the blocks l with S1_l > 0.05 nats

It is 0 if the states still hold all that the reference model lacks, and 1 if they lack as much.

Two things differ from the paper: the whole answer takes the place of the span that the authors mark by hand, and small
audits look at every third block. Nobody could make this attack with the edited model alone, because the other model
knows the fact. So a finding forbids the word "removed", and is not called a recovery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.generate import pad_token_id, tokens_for_logits
from ...models.prefix import PrefixCache, cache_prefixes, continue_from
from ...models.trace import TokenBatch, run_blocks, token_batches
from ..contract import REFERENCE, AttackResult, Audited, Context, Measure
from ..figures import depth_score
from ..prompts import answer_ids, prompt_for

#: A small audit looks at one block in so many.
STRIDE = 3


def run(subject: Audited, context: Context) -> AttackResult:
    """One minus the Unlearning Depth Score of each fact, and the loss of log-probability by block, in nats a token.

    Raises ValueError without `Context.original`. The result is `unfit` for a model of another shape or tokenizer.
    """
    target, theirs = context.original, context.earlier.get(REFERENCE)
    if target is None:
        raise ValueError("patching-depth looks into the unedited model: set Context.original")
    pairs = [_parts(subject, context, index) for index in range(len(context.facts))]
    why = _unlike(subject, target, pairs, [_parts(target, context, index) for index in range(len(context.facts))])
    why = why or (theirs.unfit if theirs else "")
    if why:
        return AttackResult(unfit=why)
    blocks = [*reversed(range(len(target.arch.blocks) - 1, -1, -1 if context.sizes.every_variant else -STRIDE))]
    losses = patching_losses(subject, target, pairs, blocks, context)
    series = {str(block): losses[:, place].tolist() for place, block in enumerate(blocks)}
    baseline = theirs.series if theirs else series
    scores = [
        depth_score([baseline[name][index] or 0.0 for name in series], [series[name][index] for name in series])
        for index in range(len(pairs))
    ]
    curve: list[float | None] = [None] * len(target.arch.blocks)
    for place, block in enumerate(blocks):
        curve[block] = float(losses[:, place].mean())
    known = [score for score in scores if score is not None]
    return AttackResult(
        (Measure("1 - depth", tuple(None if score is None else 1.0 - score for score in scores), ()),),
        series=series,
        figures={
            "nats_lost_by_block": {"mean over the answers' tokens": curve},
            "depth": sum(known) / len(known) if known else None,
        },
        notes=() if known else ("the reference model's states lack nothing: it seems to know the facts",),
    )


def _parts(subject: Audited, context: Context, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a fact's question and of its answer."""
    fact = context.facts[index]
    return prompt_for(subject, context, fact.question).ids, tuple(answer_ids(subject, context, fact.answer))


Pairs = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]


def _unlike(subject: Audited, target: Audited, own: Pairs, theirs: Pairs) -> str:
    """Why the states of one model mean nothing in the other; "" if they do mean something."""
    sizes = [(len(each.arch.blocks), each.arch.hidden_size) for each in (subject, target)]
    if sizes[0] != sizes[1]:
        return f"the {subject.role} model has other blocks or another hidden size than the unedited one"
    if own != theirs:
        return f"the {subject.role} model's tokenizer reads the facts differently from the unedited one's"
    return ""


@torch.no_grad()
def patching_losses(source: Audited, target: Audited, pairs: Pairs, blocks: Sequence[int], context: Context) -> Tensor:
    """(facts, blocks) mean log-probability, in nats, that the answers' tokens lose by the source's states."""
    out = torch.zeros(len(pairs), len(blocks))
    done = 0
    for rows in token_batches([(*asked, *said) for asked, said in pairs], tokens_for_logits(target.model)):
        chosen = [pairs[row] for row in rows]
        own, reading = _Reading.of(source, chosen), _Reading.of(target, chosen)
        states = run_blocks(
            source.arch, own.suffix, cache=own.prefix.fresh(), outputs_of=blocks, last=blocks[-1]
        ).outputs
        whole = reading.likelihoods()
        for place, block in enumerate(blocks):
            out[rows, place] = whole - reading.likelihoods(block + 1, states[block])
            context.progress((done + len(rows) * (place + 1) / len(blocks)) / len(pairs))
        done += len(rows)
    return out


@dataclass(frozen=True)
class _Reading:
    """Questions and answers as a model reads them: the positions that predict the answers, and all before them."""

    model: Audited
    prefix: PrefixCache
    suffix: TokenBatch
    answers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: Audited, pairs: Pairs) -> _Reading:
        pad_id = pad_token_id(model.model, model.tokenizer)
        prefix = cache_prefixes(model.arch, [asked[:-1] for asked, _ in pairs], pad_id)
        # From the question's last token, which predicts the answer's first, to the one before the answer's last.
        suffix = continue_from(prefix, [(asked[-1], *said[:-1]) for asked, said in pairs], pad_id)
        return cls(model, prefix, suffix, tuple(said for _, said in pairs))

    def likelihoods(self, first: int = 0, states: Tensor | None = None) -> Tensor:
        """(pairs,) mean log-probability of each answer's tokens where these states (B, S, d) go into block `first`."""
        arch = self.model.arch
        hidden = None if states is None else states.to(arch.embedding.weight)
        rows = torch.tensor([row for row, said in enumerate(self.answers) for _ in said])
        columns = torch.tensor([column for said in self.answers for column in range(len(said))])
        wanted = torch.tensor([token for said in self.answers for token in said])
        logits = run_blocks(
            arch, self.suffix, first=first, hidden=hidden, cache=self.prefix.fresh(), head_at=(rows, columns)
        ).logits
        told = logits.float().log_softmax(-1).cpu().gather(1, wanted[:, None])[:, 0]
        count = torch.tensor([len(said) for said in self.answers])
        return torch.zeros(len(self.answers)).index_add(0, rows, told) / count
