"""The closed forms for a mixture of experts: M is block-diagonal, with one block for each expert.

With keys kappa = [p_1 k_1; ...; p_E k_E] and M = diag(M_e), M_e = lambda E[kappa_e kappa_e^T],

    B_e = M_e^{-1} K_e,    Delta_e = R (I + sum_e K_e^T B_e)^{-1} B_e^T

is one n x n system, and equals the dense solution with the whole M. An expert's block is factorised only if a key
reaches the expert. Experts that neither the edit's keys nor protected keys reach do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..errors import EditError
from .solve import LowRank, NullSpace, Ridge, dual_solution, interpolation_error, relative_error, woodbury


@dataclass(frozen=True)
class ExpertsRidge:
    """`solve.Ridge` for E experts of inner width I, m = E I; or `solve.Exact`, if `exact`."""

    #: Makes the solver of one expert.
    make: Callable[[int], Ridge]
    inner: int
    exact: bool
    #: Keys of earlier edits; p may be 0.
    earlier: Float64[Tensor, "m p"]
    #: The experts' solvers made so far, also by solvers with other earlier keys.
    made: dict[int, Ridge] = field(default_factory=dict)

    @property
    def jitter(self) -> float:
        """The largest jitter of an expert that a key reached."""
        return max((each.jitter for each in self.made.values()), default=0.0)

    def protecting(self, keys: Float[Tensor, "m p"]) -> ExpertsRidge:
        """The same, with keys of earlier edits, which the next one is to leave alone."""
        return replace(self, earlier=torch.cat([self.earlier, keys.to(self.earlier)], dim=1))

    def solve(self, keys: Float[Tensor, "m n"], residual: Float[Tensor, "d n"]) -> LowRank:
        inside = keys.to(self.earlier)
        return dual_solution(
            inside, woodbury(self._inverse, self.earlier, inside), residual, 0.0 if self.exact else 1.0
        )

    def condition(self) -> float:
        """Condition number of the blocks of M that keys reached, accurate to a few per cent."""
        if not self.made:
            return 1.0
        of_blocks, of_inverses = zip(*(each.extremes() for each in self.made.values()), strict=True)
        return float(max(of_blocks) * max(of_inverses))

    def error(self, keys: Float[Tensor, "m n"], update: LowRank) -> float:
        """How far an update is from solving its equations, as for Ridge or Exact."""
        inside, rows = keys.to(self.earlier), update.down.to(self.earlier)
        if self.exact:
            return interpolation_error(rows, inside)
        product = (rows @ self.earlier) @ self.earlier.T
        for expert, part in reached(rows.T, self.inner):
            factor = self._solver(expert).factor
            product[:, _places(expert, self.inner)] += ((part.T.to(factor) @ factor) @ factor.T).to(product)
        return relative_error(rows, product, inside)

    def _inverse(self, right: Float64[Tensor, "m k"]) -> Float64[Tensor, "m k"]:
        """M^{-1} X."""
        out = torch.zeros_like(right)
        for expert, part in reached(right, self.inner):
            solver = self._solver(expert)
            # A key reaches few experts: the other columns are 0.
            columns = part.any(0).nonzero().squeeze(1)
            out[_places(expert, self.inner), columns] = solver.inverse(part[:, columns].to(solver.factor)).to(out)
        return out

    def _solver(self, expert: int) -> Ridge:
        if expert not in self.made:
            self.made[expert] = self.make(expert)
        return self.made[expert]


@dataclass(frozen=True)
class ExpertsNullSpace(NullSpace):
    """`solve.NullSpace` with directions of each expert: those that the tokens routed to it use (MoEEdit, 2602.10965).

    `protected` is empty; `directions` gives the protected directions (I, k) of one expert.
    """

    directions: Callable[[int], Float64[Tensor, "I k"]] = field(kw_only=True)
    inner: int = field(kw_only=True)
    made: dict[int, Tensor] = field(default_factory=dict, kw_only=True)

    def _projected(self, keys: Float[Tensor, "m n"]) -> Float64[Tensor, "m n"]:
        out = keys.to(self.protected, copy=True)
        for expert, part in reached(out, self.inner):
            if expert not in self.made:
                try:
                    self.made[expert] = self.directions(expert).to(self.protected)
                except EditError as error:
                    raise EditError(f"Expert {expert}: {error}") from error
            part -= self.made[expert] @ (self.made[expert].T @ part)
        return out


def reached(keys: Float64[Tensor, "m n"], inner: int) -> Iterator[tuple[int, Float64[Tensor, "I n"]]]:
    """The experts for which some key is not 0, ascending, each with its part of the keys as a view."""
    stacked = keys.unflatten(0, (len(keys) // inner, inner))
    for expert in stacked.flatten(1).any(1).nonzero().squeeze(1).tolist():
        yield expert, stacked[expert]


def _places(expert: int, inner: int) -> slice:
    return slice(expert * inner, (expert + 1) * inner)
