"""Second moments E[k k^T] of the inputs of MLP output projections, for many blocks at once, and their weighted sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from ..models.architecture import Architecture
from ..statistics.second_moment import SecondMoment, second_moments


@dataclass(frozen=True)
class RemovalData:
    """Token sequences by their role in the removal. Only facts to keep and fields with a default may be empty."""

    #: Facts to forget with their answers, one for each fact and prompt form, and where the answers begin.
    forget: tuple[tuple[int, ...], ...]
    forget_starts: tuple[int, ...]
    #: The same for facts to keep.
    kept: tuple[tuple[int, ...], ...]
    kept_starts: tuple[int, ...]
    #: Ordinary text and questions.
    text: tuple[tuple[int, ...], ...]
    #: The forgotten facts' words in random order.
    words: tuple[tuple[int, ...], ...]
    #: Neighbours: questions around the facts to forget with the model's own answers, in the form of facts to keep.
    neighbours: tuple[tuple[int, ...], ...] = ()
    neighbour_starts: tuple[int, ...] = ()
    #: Spans (first, end) of the tokens that name the subject, for every fact to forget; () if it has no subject.
    forget_subjects: tuple[tuple[tuple[int, int], ...], ...] = ()
    #: Names of subjects that do not exist, as tokens.
    strangers: tuple[tuple[int, ...], ...] = ()
    #: Questions to forget with the replacement answer to learn, and where it begins; () if none is learned.
    instead: tuple[tuple[int, ...], ...] = ()
    instead_starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Moments:
    """Second moments of the projections' inputs k, (m, m) for each layer: means over the positions that count."""

    #: F: forgotten answers, from the prompt's last token to the answer's last but one; None if not needed.
    forgotten: SecondMoment | None
    #: R_r: facts to keep with their answers; None without facts to keep.
    kept: SecondMoment | None
    #: R_n: neighbours of the facts to forget with their answers; None without neighbours.
    neighbours: SecondMoment | None
    #: R_c: ordinary text.
    text: SecondMoment
    #: R_s: the forgotten facts' words in random order.
    words: SecondMoment


def answer_positions(sequence: Sequence[int], start: int) -> tuple[int, ...]:
    """Positions whose next token belongs to the answer: from the prompt's last to the sequence's last but one."""
    return tuple(range(start - 1, len(sequence) - 1))


def take_moments(
    arch: Architecture,
    data: RemovalData,
    layers: Sequence[int],
    rows: Sequence[int],
    *,
    max_tokens: int,
    pad_id: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Moments:
    """All five moments of `layers`, with the present weights. That of forgotten answers covers the facts `rows`."""
    forgotten = [data.forget[row] for row in rows]
    places = [answer_positions(data.forget[row], data.forget_starts[row]) for row in rows]
    total = sum(map(len, (*forgotten, *data.kept, *data.neighbours, *data.text, *data.words)))
    done = 0

    def take(sequences: Sequence[Sequence[int]], counted: Sequence[Sequence[int]] | None = None) -> SecondMoment:
        nonlocal done
        begun, size = done, sum(map(len, sequences))
        found = second_moments(
            arch,
            sequences,
            layers,
            max_tokens=max_tokens,
            pad_id=pad_id,
            counted=counted,
            progress=lambda share: progress((begun + share * size) / total),
        )
        done += size
        return found

    return Moments(
        forgotten=take(forgotten, places) if forgotten else None,
        kept=take(data.kept) if data.kept else None,
        neighbours=take(data.neighbours) if data.neighbours else None,
        text=take(data.text),
        words=take(data.words),
    )


def weighed(
    parts: Sequence[tuple[float, SecondMoment | None]], layers: Sequence[int]
) -> dict[int, Float32[Tensor, "m m"]]:
    """sum_i w_i C_i for each layer, on the CPU. Parts that are None count as zero."""
    return {
        layer: torch.stack([weight * part.moments[layer] for weight, part in parts if part is not None]).sum(0)
        for layer in layers
    }
