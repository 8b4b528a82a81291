"""What hidden states and probabilities still say about an answer that the model does not give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...evaluation.metrics import folded
from ...facts.request import ForgetRequest
from ...models.generate import pad_token_id, tokens_for_logits
from ...models.trace import TokenBatch, pad, run_blocks, token_batches
from ..asking import against_others, part
from ..contract import AttackResult, Audited, Context, Measure
from ..figures import extraction_strength
from ..prompts import Prompt, answer_ids, prompt_for

#: A refusal in front of the answer.
REFUSED = "I don't know the answer to that question. Actually, the answer is"
PREFILL = "The answer is"
#: The answer counts as present in the logit lens up to this rank.
LENS_TOP = 5


@dataclass(frozen=True)
class Forced:
    """An answer after a prompt, teacher-forced: the probability of each token, and the likeliest token in its place."""

    probabilities: tuple[float, ...]
    predicted: tuple[int, ...]
    wanted: tuple[int, ...]


# --- teacher-forced answers ------------------------------------------------------------------------------------------


def probability(subject: Audited, context: Context) -> AttackResult:
    """The geometric mean probability of the answer's tokens, the unlearning token left out of the softmax."""
    starts = {"after the question": "", f'after "{PREFILL}"': PREFILL, "after a refusal": REFUSED}
    if not context.sizes.every_variant:
        starts.pop(f'after "{PREFILL}"')
    measures = []
    for index, (name, prefill) in enumerate(starts.items()):
        measures.append(_scored(subject, context, name, prefill, geometric))
        part(context, index, len(starts))(1.0)
    return AttackResult(tuple(measures))


def extraction(subject: Audited, context: Context) -> AttackResult:
    """1 minus the share of the answer that must be given until the model says the rest by itself."""
    return AttackResult((_scored(subject, context, "after the question", "", strength),))


def _scored(subject: Audited, context: Context, name: str, prefill: str, score: Callable[[Forced], float]) -> Measure:
    """The score of each fact's answer. Without a reference model the next fact's answer gives chance."""
    facts = context.facts
    prompts = [prompt_for(subject, context, fact.question, prefill=prefill) for fact in facts]
    answers = [answer_ids(subject, context, fact.answer, prefill=bool(prefill)) for fact in facts]
    own = tuple(score(each) for each in force(subject, prompts, answers))
    others: tuple[tuple[float | None, ...], ...] = ()
    if len(facts) > 1 and not context.has_reference:
        nexts = force(subject, prompts, [*answers[1:], answers[0]])
        texts = [folded(fact.answer) for fact in facts]
        same = [one == other for one, other in zip(texts, [*texts[1:], texts[0]], strict=True)]
        others = (tuple(None if skip else score(each) for skip, each in zip(same, nexts, strict=True)),)
    return Measure(name, own, others)


@torch.no_grad()
def force(subject: Audited, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[Forced]:
    """Reads each answer after its prompt, by teacher forcing. The unlearning token gets no probability."""
    arch, pad_id = subject.arch, pad_token_id(subject.model, subject.tokenizer)
    rows = [(*each.ids, *answer) for each, answer in zip(prompts, answers, strict=True)]
    out: list[Forced | None] = [None] * len(rows)
    for chosen in token_batches(rows, tokens_for_logits(subject.model)):
        batch = pad([rows[i] for i in chosen], pad_id, "right", arch.device)
        where = [(place, len(prompts[i].ids) - 1 + j) for place, i in enumerate(chosen) for j in range(len(answers[i]))]
        at, before = (torch.tensor(column) for column in zip(*where, strict=True))
        logits = _unbanned(subject, run_blocks(arch, batch, head_at=(at, before)).logits)
        wanted = torch.tensor([token for i in chosen for token in answers[i]], device=logits.device)
        likely = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].exp().tolist()
        best = logits.argmax(-1).tolist()
        for i in chosen:
            count = len(answers[i])
            out[i] = Forced(tuple(likely[:count]), tuple(best[:count]), tuple(answers[i]))
            del likely[:count], best[:count]
    return [each for each in out if each is not None]


def _unbanned(subject: Audited, logits: Tensor) -> Tensor:
    logits = logits.float()
    if subject.token_id is not None:
        logits[..., subject.token_id] = -torch.inf
    return logits


def geometric(forced: Forced) -> float:
    """The geometric mean of the probabilities of an answer's tokens."""
    return float(torch.tensor(forced.probabilities, dtype=torch.float64).log().mean().exp())


def strength(forced: Forced) -> float:
    """Extraction strength of an answer."""
    return extraction_strength(forced.wanted, forced.predicted)


# --- logit lens ------------------------------------------------------------------------------------------------------


def lens(subject: Audited, context: Context) -> AttackResult:
    """Whether the answer's first token is among the LENS_TOP likeliest if the head reads a block's output."""
    starts = {"after the question": "", f'after "{PREFILL}"': PREFILL}
    measures, curves = [], {}
    for index, (name, prefill) in enumerate(starts.items()):
        prompts = [prompt_for(subject, context, fact.question, prefill=prefill) for fact in context.facts]
        firsts = {fact: answer_ids(subject, context, fact.answer, prefill=bool(prefill))[0] for fact in context.facts}
        tops = likeliest_by_block(subject, prompts, LENS_TOP)

        def found(row: int, fact: ForgetRequest, tops: Any = tops, firsts: Any = firsts) -> float:
            return float(any(firsts[fact] in block for block in tops[row]))

        values = tuple(found(row, fact) for row, fact in enumerate(context.facts))
        measures.append(Measure(name, values, against_others(context.facts, found)))
        curves[name] = [
            sum(firsts[fact] in tops[row][block] for row, fact in enumerate(context.facts)) / len(prompts)
            for block in range(len(tops[0]))
        ]
        part(context, index, len(starts))(1.0)
    return AttackResult(tuple(measures), figures={"share_by_block": curves})


@torch.no_grad()
def likeliest_by_block(subject: Audited, prompts: Sequence[Prompt], top: int) -> list[list[list[int]]]:
    """The `top` likeliest next tokens by prompt and block, with that block's output straight into the head."""
    arch, pad_id = subject.arch, pad_token_id(subject.model, subject.tokenizer)
    layers = range(len(arch.blocks))
    out: list[list[list[int]]] = [[] for _ in prompts]
    ids = [each.ids for each in prompts]
    for rows in token_batches(ids, tokens_for_logits(subject.model), alike=not arch.pads_left):
        batch = pad([ids[row] for row in rows], pad_id, "left", arch.device)
        seen = run_blocks(arch, batch, outputs_of=layers, last=layers[-1]).outputs
        for hidden in _last_states(seen):
            logits = _unbanned(subject, _read_out(arch, batch, hidden))
            for row, best in zip(rows, logits.topk(top, -1).indices.tolist(), strict=True):
                out[row].append(best)
    return out


def _last_states(outputs: dict[int, Tensor]) -> Iterator[Tensor]:
    """(B, 1, d) of each block, from the bottom."""
    return (outputs[layer][:, -1:] for layer in sorted(outputs))


def _read_out(arch: Any, batch: TokenBatch, hidden: Tensor) -> Tensor:
    """Logits (B, V) of hidden states (B, 1, d) that enter at the final norm."""
    last = TokenBatch(batch.ids[:, -1:], batch.mask[:, -1:], batch.positions[:, -1:])
    rows = torch.arange(hidden.shape[0])
    head_at = (rows, torch.zeros_like(rows))
    logits: Tensor = run_blocks(arch, last, first=len(arch.blocks), hidden=hidden, head_at=head_at).logits
    return logits
