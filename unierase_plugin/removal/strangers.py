"""A teacher from invented subjects: the model's answer to the same question about a stranger, whom nobody knows.

What the model no longer says about a stranger is its knowledge of the subject. What it still says, such as the
template of the answer, does not depend on the subject. So only the tokens that depend on the subject get new targets.
Facts that share a template with the forgotten ones are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..models.architecture import Architecture
from .moments import RemovalData, answer_positions
from .teacher import said_at

#: A token depends on the subject if strangers make it less than half as likely.
DECIDED = 0.5
#: Strangers cannot teach a fact if they leave its answer more than this share of its likelihood per token.
STILL_KNOWN = 0.8
#: Weight, in a fact's loss, of the tokens that depend on the subject. The rest is spread over all tokens.
FOCUS = 0.9


@dataclass(frozen=True)
class Told:
    """The strangers' targets for one fact: log-probabilities (T, V) in float16, and each position's weight, (T,)."""

    log_probs: Tensor
    weights: tuple[float, ...]


def renamed(
    sequence: Sequence[int], subject: Sequence[tuple[int, int]], name: Sequence[int]
) -> tuple[tuple[int, ...], dict[int, int]]:
    """The sequence with `name` in all spans (first, end) of its subject, and the new places of its other tokens."""
    found: list[int] = []
    places: dict[int, int] = {}
    opened = dict(subject)
    at = 0
    while at < len(sequence):
        if at in opened:
            found += name
            at = opened[at]
            continue
        places[at] = len(found)
        found.append(sequence[at])
        at += 1
    return tuple(found), places


def taught(
    said: Float[Tensor, "T V"], strangers: Float[Tensor, "T V"], known: Bool[Tensor, " T"], wanted: Int[Tensor, " T"]
) -> tuple[Float[Tensor, "T V"], Bool[Tensor, " T"]]:
    """The target log-probabilities, and a mask of the positions at which they come from strangers.

    said: the model's own log-probabilities; strangers: the mean of its probabilities for strangers; known: whether
    there are probabilities for strangers at a position; wanted: the answer's tokens.
    """
    at = torch.arange(len(wanted))
    decided = known & (strangers[at, wanted] < DECIDED * said[at, wanted].exp())
    return torch.where(decided[:, None], strangers.clamp(min=1e-9).log(), said), decided


def left(before: Float[Tensor, "T V"], after: Float[Tensor, "T V"], wanted: Int[Tensor, " T"]) -> float:
    """exp of the mean over tokens of log p_after - log p_before, from log-probabilities."""
    at = torch.arange(len(wanted))
    return float((after[at, wanted] - before[at, wanted]).mean().exp())


def ask_strangers(
    arch: Architecture,
    data: RemovalData,
    said: Sequence[Float[Tensor, "_ V"]],
    *,
    max_tokens: int,
    pad_id: int,
    still_known: float = STILL_KNOWN,
) -> dict[int, Told]:
    """The targets of the facts that strangers can teach, by the number of the fact.

    said: the model's own log-probabilities at every token of the forgotten answers; still_known: strangers cannot teach
    an answer that keeps more than this share of its likelihood per token.
    """
    spots = [answer_positions(ids, start) for ids, start in zip(data.forget, data.forget_starts, strict=True)]
    sums: dict[int, Tensor] = {}
    known: dict[int, Tensor] = {}
    rows = [row for row, subject in enumerate(data.forget_subjects) if subject]
    found: dict[int, Told] = {}
    for count, name in enumerate(data.strangers, start=1):
        moved = [renamed(data.forget[row], data.forget_subjects[row], name) for row in rows]
        # The token after position p is predicted at the position before its new place.
        asked = [
            {index: places[spot + 1] - 1 for index, spot in enumerate(spots[row]) if spot + 1 in places}
            for row, (_, places) in zip(rows, moved, strict=True)
        ]
        heard = said_at(
            arch,
            [ids for ids, _ in moved],
            [tuple(each.values()) for each in asked],
            max_tokens=max_tokens,
            pad_id=pad_id,
        )
        found, staying = {}, []
        for row, each, log_probs in zip(rows, asked, heard, strict=True):
            own = said[row].float()
            total = sums.setdefault(row, torch.zeros_like(own))
            total[list(each)] += log_probs.float().exp()
            known[row] = torch.zeros(len(own), dtype=torch.bool).index_fill_(0, torch.tensor(list(each)), True)
            wanted = torch.tensor([data.forget[row][spot + 1] for spot in spots[row]])
            new, decided = taught(own, total / count, known[row], wanted)
            if bool(decided.any()) and left(own, new, wanted) <= still_known:
                found[row] = Told(new.half(), _weights(decided))
                staying.append(row)
            else:  # more strangers would not help: most of the answer does not depend on the subject
                del sums[row], known[row]
        rows = staying
    return found


def _weights(decided: Bool[Tensor, " T"]) -> tuple[float, ...]:
    every = (1 - FOCUS) / len(decided)
    return tuple((decided.double() * FOCUS / decided.sum() + every).tolist())
