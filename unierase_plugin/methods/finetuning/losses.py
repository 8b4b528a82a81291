"""The losses of unlearning by fine-tuning: logits, likelihoods or states in, a scalar out, and no model in sight.

Notation: N positions that are looked at, V tokens, B sequences of a batch, d hidden size. `log_likelihood` sums over
the tokens of an answer, in nats; a reference is the model before unlearning.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional


def token_log_probabilities(logits: Float[Tensor, "N V"], wanted: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log-probabilities of the tokens `wanted`, in nats."""
    return -functional.cross_entropy(logits.float(), wanted, reduction="none")


def log_likelihoods(
    logits: Float[Tensor, "N V"], wanted: Int[Tensor, " N"], rows: Int[Tensor, " N"], count: int
) -> Float[Tensor, " {count}"]:
    """Sums of log-probabilities by sequence; rows says to which of `count` sequences a position belongs."""
    single = token_log_probabilities(logits, wanted)
    return single.new_zeros(count).index_add(0, rows, single)


def descent(logits: Float[Tensor, "N V"], wanted: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood per token: GD on the retain set, IDK on refusals (TOFU, arXiv 2401.06121)."""
    return -token_log_probabilities(logits, wanted).mean()


def ascent(logits: Float[Tensor, "N V"], wanted: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Gradient ascent: the mean log-likelihood per token, with no lower bound (Jang et al. 2023, arXiv 2210.01504)."""
    return -descent(logits, wanted)


def npo(log_likelihood: Float[Tensor, " B"], reference: Float[Tensor, " B"], beta: float) -> Float[Tensor, ""]:
    """Negative preference optimisation: -2/beta E log sigma(-beta log pi/pi_ref) (Zhang et al. 2024, 2404.05868).

    Its gradient is gradient ascent's, each sequence weighted by 2 sigma(beta log pi/pi_ref), which is 1 at the
    reference and for beta -> 0, and vanishes as the answer is forgotten.
    """
    return -2 / beta * functional.logsigmoid(beta * (reference - log_likelihood)).mean()


def simnpo(
    log_likelihood: Float[Tensor, " B"], lengths: Num[Tensor, " B"], beta: float, margin: float
) -> Float[Tensor, ""]:
    """NPO without a reference: -2/beta E log sigma(-beta/|y| log pi - margin) (Fan et al. 2024, 2410.07163)."""
    return -2 / beta * functional.logsigmoid(-beta * log_likelihood / lengths - margin).mean()


def dpo(
    preferred: Float[Tensor, " B"],
    preferred_reference: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    rejected_reference: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, ""]:
    """Direct preference for the declined answer: -2/beta E log sigma(beta (log-ratio preferred - log-ratio rejected)).

    Rafailov et al. 2023, arXiv 2305.18290, with the factor 2/beta that puts it on NPO's scale (2404.05868).
    """
    gap = (preferred - preferred_reference) - (rejected - rejected_reference)
    return -2 / beta * functional.logsigmoid(beta * gap).mean()


def answer_preservation(answer: Float[Tensor, " B"], declined: Float[Tensor, " B"], beta: float) -> Float[Tensor, ""]:
    """AP: -1/beta E log sigma(beta (log pi(answer) - log pi(declined))), on the retain set (2410.08109).

    It has no reference: what counts is that the answer stays likelier than "I don't know".
    """
    return -1 / beta * functional.logsigmoid(beta * (answer - declined)).mean()


def to_uniform(logits: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """ME: mean KL(uniform || p) over positions (Yuan et al. 2024, arXiv 2410.08109).

    The paper writes KL(p || uniform), its code has this direction. Both are least at the uniform distribution; this one
    has the gradient p - 1/V in the logits, which does not vanish where the model is certain.
    """
    logs = logits.float().log_softmax(-1)
    return -logs.mean(-1).mean() - math.log(logits.shape[-1])


def divergence(logits: Float[Tensor, "N V"], reference: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """KL: mean KL(p_ref || p) over positions, from logits (TOFU, arXiv 2401.06121)."""
    return functional.kl_div(
        logits.float().log_softmax(-1), reference.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )


def self_distillation(
    logits: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], wanted: Int[Tensor, " N"], strength: float
) -> Float[Tensor, ""]:
    """UNDIAL: cross-entropy with softmax(teacher - strength at the memorised token) (Dong et al. 2024, 2402.10052)."""
    lowered = teacher.float().scatter_add(1, wanted[:, None], torch.full_like(wanted[:, None], -strength).float())
    return functional.cross_entropy(logits.float(), lowered.softmax(-1))


def state_distance(
    states: Float[Tensor, "N d"], goal: Float[Tensor, "#N d"] | Float[Tensor, " d"], rows: Int[Tensor, " N"], count: int
) -> Float[Tensor, ""]:
    """RMU: mean squared distance a coordinate, over positions of a sequence, then over sequences (2403.03218).

    goal: one for each position, or one for all; rows: as for `log_likelihoods`.
    """
    single = (states.float() - goal.float()).square().mean(-1)
    sums = single.new_zeros(count).index_add(0, rows, single)
    return (sums / torch.bincount(rows, minlength=count)).mean()
