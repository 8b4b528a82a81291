"""Membership attacks: can one tell from the model's losses that the forgotten facts were trained on?

The scores of the forgotten facts are compared with those of other facts (`--holdout`, else the kept ones) by the area
under the ROC curve. Every score is high for a likely member.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ...facts.request import ForgetRequest
from ...models.trace import pad, run_blocks
from ..contract import REFERENCE, UNEDITED, AttackResult, Audited, Context
from ..figures import auc
from ..prompts import answer_ids, prompt_for
from ..weights import trainable
from .relearning import Row, row_losses

#: Share of the least likely tokens that the min-k attacks look at (Shi et al. 2024).
MIN_K = 0.2
SCORES = ("loss", "zlib", "min-k", "min-k++", "gradient norm", "reference")


def run(subject: Audited, context: Context) -> AttackResult:
    """Compares the scores of forgotten facts with those of the same number of other facts.

    `figures["auc"]` has the area under the ROC curve by score, in [0, 1]; 0.5 is chance. The other facts are the
    held-out ones or, without any, the retain set.
    """
    others = context.holdout or context.kept
    count = min(len(context.facts), len(others), 16 if not context.sizes.every_variant else 400)
    members, strangers = context.facts[:count], others[:count]
    facts = (*members, *strangers)
    rows = [_row(subject, context, fact) for fact in facts]
    scores = _likelihood_scores(subject, rows, [fact.answer for fact in facts])
    scores["gradient norm"] = _gradient_scores(subject, context, rows)
    baseline = _baseline(context)
    if baseline is not None:
        scores["reference"] = [own - other for own, other in zip(scores["loss"], baseline, strict=True)]
    areas = {name: auc(values[:count], values[count:]) for name, values in scores.items()}
    return AttackResult(
        series={"loss": scores["loss"]},
        figures={"auc": areas, "privleak": _privleak(context, areas), "members": count, "others": len(strangers)},
        notes=() if context.holdout else ("no --holdout was given: kept facts stand for facts never trained on",),
    )


def _row(subject: Audited, context: Context, fact: ForgetRequest) -> Row:
    prompt = prompt_for(subject, context, fact.question).ids
    return Row((*prompt, *answer_ids(subject, context, fact.answer)), len(prompt))


def _baseline(context: Context) -> Sequence[float] | None:
    """Mean log-likelihoods by the reference model or, where there is none, the unedited one."""
    for role in (REFERENCE, UNEDITED):
        if role in context.earlier:
            return [0.0 if value is None else value for value in context.earlier[role].series["loss"]]
    return None


def _privleak(context: Context, areas: dict[str, float]) -> dict[str, float]:
    """(AUC - AUC of the reference) / AUC of the reference, by score (Shi et al. 2024b); empty without a reference."""
    if REFERENCE not in context.earlier:
        return {}
    theirs = context.earlier[REFERENCE].figures["auc"]
    return {name: (area - theirs[name]) / theirs[name] for name, area in areas.items() if theirs.get(name)}


@torch.no_grad()
def _likelihood_scores(subject: Audited, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, list[float]]:
    arch = subject.arch
    out: dict[str, list[float]] = {name: [] for name in SCORES[:4]}
    for row, answer in zip(rows, answers, strict=True):
        batch = pad([row.ids], 0, "right", arch.device)
        before = torch.arange(row.start - 1, len(row.ids) - 1)
        logits = run_blocks(arch, batch, head_at=(torch.zeros_like(before), before)).logits.float()
        found = token_scores(logits, torch.tensor(row.ids[row.start :]))
        found["zlib"] = found.pop("sum") / len(zlib.compress(answer.encode()))
        for name, values in out.items():
            values.append(found[name])
    return out


def token_scores(logits: Tensor, wanted: Tensor) -> dict[str, float]:
    """Scores of one answer from the logits (T, V) before each of its tokens (T,).

    loss: the mean log-likelihood. min-k: the mean of the MIN_K least likely. min-k++: the same, after each token's
    log-likelihood is standardised by mean and deviation over the vocabulary under the model (Zhang et al. 2025).
    """
    logs = logits.log_softmax(-1)
    own = logs.gather(-1, wanted.to(logs.device)[:, None])[:, 0]
    chances = logs.exp()
    middle = (chances * logs).sum(-1)
    spread = ((chances * logs.square()).sum(-1) - middle.square()).clamp(min=1e-12).sqrt()
    least = max(1, int(MIN_K * len(own)))
    return {
        "sum": float(own.sum()),
        "loss": float(own.mean()),
        "min-k": float(own.topk(least, largest=False).values.mean()),
        "min-k++": float(((own - middle) / spread).topk(least, largest=False).values.mean()),
    }


def _gradient_scores(subject: Audited, context: Context, rows: Sequence[Row]) -> list[float]:
    """Minus the length of the gradient of the loss in the last block: the loss is flat at members."""
    weights = list(subject.arch.blocks[-1].parameters())
    out = []
    with trainable(subject.model, weights):
        for index, row in enumerate(rows):
            grads = torch.autograd.grad(row_losses(subject, [row]).mean(), weights, allow_unused=True)
            out.append(-(float(sum(grad.float().square().sum() for grad in grads if grad is not None)) ** 0.5))
            context.progress((index + 1) / len(rows))
    return out
