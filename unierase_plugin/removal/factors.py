"""A change of weights as low-rank factors: the best approximation of a rank, and its share of the change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..locate_then_edit.solve import LowRank
from .teacher import solver_device

#: Shares of the energy. For each, the rank that holds it is reported.
SHARES = (0.9, 0.99)


@dataclass(frozen=True)
class Truncated:
    """Factors of a change (float32, CPU), the share of |change|^2 in them, and the ranks that hold SHARES of it."""

    factors: LowRank
    energy: float
    ranks: tuple[int, ...]


def truncated(change: Float[Tensor, "d m"], rank: int) -> Truncated:
    """The best approximation of a change with rank `rank`; 0 gives the whole change (Eckart and Young 1936).

    Uses the eigenvectors of the smaller of its two Gram matrices, in float64: up = U_r and down = U_r^T change if d is
    the smaller side, else up = change V_r and down = V_r^T.
    """
    whole = change.to(solver_device(change), torch.float64)
    tall = whole.shape[0] > whole.shape[1]
    values, vectors = torch.linalg.eigh(whole.T @ whole if tall else whole @ whole.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = float(values.sum())
    held = values.cumsum(0) / total if total else torch.ones_like(values)
    size = min(rank or len(values), len(values))
    chosen = vectors[:, :size]
    up, down = (whole @ chosen, chosen.T) if tall else (chosen, chosen.T @ whole)
    ranks = tuple(min(int((held < share).sum()) + 1, len(values)) for share in SHARES)
    factors = LowRank(*(each.to("cpu", torch.float32).contiguous() for each in (up, down)))
    return Truncated(factors, float(held[size - 1]), ranks)
