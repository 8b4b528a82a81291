"""The terms that fine-tuning methods are made of: each names the sequences it reads, and turns a batch into a scalar.

A method minimises forget_weight x (a term on the forget set) + retain_weight x (a term on the retain set). A new term
is a function of a `Batch`, and an entry in `TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from . import losses

#: What a fact is trained on: its answer, or an "I don't know" sentence in its place.
FORGET, DECLINED, RETAIN, RETAIN_DECLINED = "forget", "declined", "retain", "retain_declined"


@dataclass(frozen=True)
class Looked:
    """Predictions at N positions: logits (N, V), the tokens that stand there (N,), and their sequence (N,)."""

    logits: Tensor
    wanted: Tensor
    rows: Tensor
    #: Sequences of the batch.
    count: int

    @property
    def log_likelihoods(self) -> Tensor:
        return losses.log_likelihoods(self.logits, self.wanted, self.rows, self.count)


class Batch(Protocol):
    """What a term may ask of one batch. `part` is FORGET, DECLINED, RETAIN or RETAIN_DECLINED."""

    def answers(self, part: str) -> Looked:
        """The positions of the answers, their end included."""

    def texts(self, part: str) -> Looked:
        """All positions, those of the question included."""

    def states(self, part: str) -> tuple[Tensor, Tensor, int]:
        """Hidden states (N, d) of all positions after the watched block, their sequence, and B."""

    def reference_likelihoods(self, part: str) -> Tensor:
        """(B,) log-likelihoods of the answers by the model before unlearning."""

    def reference_logits(self, part: str, whole: bool) -> Tensor:
        """(N, V) of the model before unlearning, for `texts` (whole) or `answers`."""

    def reference_states(self, part: str) -> Tensor:
        """(N, d) of the model before unlearning, for `states`."""

    def direction(self) -> Tensor:
        """(d,) a fixed random unit vector with positive coordinates."""


@dataclass(frozen=True)
class Term:
    """A loss, and the data that it needs."""

    loss: Callable[[Batch, Any], Tensor]
    #: Parts of the facts that it reads.
    parts: tuple[str, ...]
    #: Parts of which it needs likelihoods, logits or states of the model before training.
    likelihoods: tuple[str, ...] = ()
    logits: tuple[str, ...] = ()
    states: tuple[str, ...] = ()


def _nll(part: str) -> Term:
    def loss(batch: Batch, h: Any) -> Tensor:
        looked = batch.answers(part)
        return losses.descent(looked.logits, looked.wanted)

    return Term(loss, (part,))


def _ga(batch: Batch, h: Any) -> Tensor:
    looked = batch.answers(FORGET)
    return losses.ascent(looked.logits, looked.wanted)


def _npo(batch: Batch, h: Any) -> Tensor:
    return losses.npo(batch.answers(FORGET).log_likelihoods, batch.reference_likelihoods(FORGET), h.beta)


def _simnpo(batch: Batch, h: Any) -> Tensor:
    looked = batch.answers(FORGET)
    lengths = looked.rows.bincount(minlength=looked.count)
    return losses.simnpo(looked.log_likelihoods, lengths, h.beta, h.margin)


def _dpo(batch: Batch, h: Any) -> Tensor:
    return losses.dpo(
        batch.answers(DECLINED).log_likelihoods,
        batch.reference_likelihoods(DECLINED),
        batch.answers(FORGET).log_likelihoods,
        batch.reference_likelihoods(FORGET),
        h.beta,
    )


def _me(batch: Batch, h: Any) -> Tensor:
    return losses.to_uniform((batch.texts(FORGET) if h.whole_text else batch.answers(FORGET)).logits)


def _undial(batch: Batch, h: Any) -> Tensor:
    looked = batch.answers(FORGET)
    return losses.self_distillation(looked.logits, batch.reference_logits(FORGET, False), looked.wanted, h.strength)


def _rmu(batch: Batch, h: Any) -> Tensor:
    states, rows, count = batch.states(FORGET)
    return losses.state_distance(states, h.steering * batch.direction(), rows, count)


def _kl(batch: Batch, h: Any) -> Tensor:
    return losses.divergence(batch.texts(RETAIN).logits, batch.reference_logits(RETAIN, True))


def _ap(batch: Batch, h: Any) -> Tensor:
    return losses.answer_preservation(
        batch.answers(RETAIN).log_likelihoods, batch.answers(RETAIN_DECLINED).log_likelihoods, h.beta
    )


def _same_states(batch: Batch, h: Any) -> Tensor:
    states, rows, count = batch.states(RETAIN)
    return losses.state_distance(states, batch.reference_states(RETAIN), rows, count)


#: By the name that a method's table gives.
TERMS: dict[str, Term] = {
    "learn": _nll(FORGET),
    "ga": Term(_ga, (FORGET,)),
    "npo": Term(_npo, (FORGET,), likelihoods=(FORGET,)),
    "simnpo": Term(_simnpo, (FORGET,)),
    "dpo": Term(_dpo, (FORGET, DECLINED), likelihoods=(FORGET, DECLINED)),
    "idk": _nll(DECLINED),
    "me": Term(_me, (FORGET,)),
    "undial": Term(_undial, (FORGET,), logits=(FORGET,)),
    "rmu": Term(_rmu, (FORGET,)),
    "gd": _nll(RETAIN),
    "kl": Term(_kl, (RETAIN,), logits=(RETAIN,)),
    "ap": Term(_ap, (RETAIN, RETAIN_DECLINED)),
    "states": Term(_same_states, (RETAIN,), states=(RETAIN,)),
}
