"""Closed forms of the edit: pure linear algebra, without a model.

Notation: keys K (m, n), residual R (d, n), corpus second moment C (m, m). Every update is returned as two factors:
Delta = up @ down with up (d, n) and down (n, m). Its rank is at most the number of requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..errors import EditError

#: Shares that are tried on a moment's diagonal, smallest first.
JITTERS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
#: If smallest / largest pivot of a factor is greater than this, rounding of float32 sums does not affect it.
SOUND = 1e-4


@dataclass(frozen=True)
class LowRank:
    """Delta = up @ down."""

    up: Float[Tensor, "d n"]
    down: Float[Tensor, "n m"]

    def matrix(self) -> Float[Tensor, "d m"]:
        return self.up @ self.down

    def norm(self) -> float:
        """Frobenius norm of the product, computed from n x n matrices only."""
        return float(((self.up.T @ self.up) * (self.down @ self.down.T)).sum().clamp(min=0).sqrt())


class Solver(Protocol):
    """Solves the equations of one block. m is the size of keys, d the size of states, n the number of requests."""

    def protecting(self, keys: Float[Tensor, "m p"]) -> Solver:
        """The same solver, with keys that the edit shall leave alone: of earlier edits, or of facts to keep."""

    def solve(self, keys: Float[Tensor, "m n"], residual: Float[Tensor, "d n"]) -> LowRank:
        """The update that moves the keys' outputs by the residual, as far as the solver's other terms allow.

        Raises EditError if the keys are degenerate.
        """

    def condition(self) -> float:
        """Condition number of the system, for the report."""

    def error(self, keys: Float[Tensor, "m n"], update: LowRank) -> float:
        """How far an update is from solving the solver's equations, as a relative error; for the report."""


@dataclass(frozen=True)
class Ridge:
    """MEMIT, equation 14, solved in the dual: Delta = R (I + K^T B)^{-1} B^T with B = (M + K_p K_p^T)^{-1} K.

    M = lambda C (+ weight x retain moment). It is factorised once. Keys K_p of earlier edits are added by Woodbury's
    identity, so one factor serves every step of sequential editing.
    """

    #: Lower Cholesky factor of M.
    factor: Float64[Tensor, "m m"]
    jitter: float = 0.0
    #: Keys of earlier edits; p may be 0.
    earlier: Float64[Tensor, "_ p"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    @classmethod
    def of(cls, second_moment: Float[Tensor, "m m"]) -> Ridge:
        """Factorises M in float64 on its own device.

        With fewer tokens than m, or with float32 sums, M is singular. Then the smallest of JITTERS (shares of its mean
        eigenvalue) that makes M safely definite is added to the diagonal.
        """
        moment = second_moment.double()
        scale = moment.diagonal().mean()
        if not torch.isfinite(moment).all() or not scale > 0:
            raise EditError("The second moment C holds NaN or is zero. Check the corpus and the model's weights.")
        for jitter in JITTERS:
            shifted = moment.clone()
            shifted.diagonal().add_(jitter * scale)
            factor, info = torch.linalg.cholesky_ex(shifted)
            pivots = factor.diagonal()
            if not int(info) and (jitter or pivots.min() > SOUND * pivots.max()):
                return cls(factor, jitter, factor.new_zeros(len(factor), 0))
        raise EditError(
            f"The second moment C is not positive definite, even with {JITTERS[-1]} of its mean eigenvalue added. "
            "Check the corpus and the model's weights."
        )

    def protecting(self, keys: Float[Tensor, "m p"]) -> Ridge:
        """The same, with keys of earlier edits, which the next one is to leave alone."""
        return replace(self, earlier=torch.cat([self.earlier, keys.to(self.factor)], dim=1))

    def solve(self, keys: Float[Tensor, "m n"], residual: Float[Tensor, "d n"]) -> LowRank:
        inside = keys.to(self.factor)
        return dual_solution(inside, woodbury(self.inverse, self.earlier, inside), residual)

    def inverse(self, right: Float64[Tensor, "m k"]) -> Float64[Tensor, "m k"]:
        """M^{-1} X by two triangular solves. `cholesky_solve` would copy the factor first, which takes as long."""
        half = torch.linalg.solve_triangular(self.factor, right, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self.factor.T, half, upper=True)
        return whole

    def condition(self) -> float:
        """Condition number of M, by power iteration, accurate to a few per cent."""
        most, most_of_inverse = self.extremes()
        return most * most_of_inverse

    def extremes(self) -> tuple[float, float]:
        """The largest eigenvalues of M and of its inverse."""
        most = _largest(lambda v: self.factor @ (self.factor.T @ v), self.factor)
        return most, _largest(self.inverse, self.factor)

    def error(self, keys: Float[Tensor, "m n"], update: LowRank) -> float:
        """How far an update is from solving its equations: |D (M + K_p K_p^T + K K^T) - K^T| / |K|, D = update.down."""
        inside, rows = keys.to(self.factor), update.down.to(self.factor)
        product = (rows @ self.factor) @ self.factor.T + (rows @ self.earlier) @ self.earlier.T
        return relative_error(rows, product, inside)


@dataclass(frozen=True)
class Exact(Ridge):
    """ROME, equation 2, for n keys at once: Delta = R (K^T B)^{-1} B^T, B as in Ridge.

    Of all updates that map each key exactly to its value, this one moves the keys of M least. It is Ridge's limit as M
    goes to 0, so the weight lambda in M does not matter.
    """

    def solve(self, keys: Float[Tensor, "m n"], residual: Float[Tensor, "d n"]) -> LowRank:
        inside = keys.to(self.factor)
        solved = woodbury(lambda right: torch.cholesky_solve(right, self.factor), self.earlier, inside)
        return dual_solution(inside, solved, residual, slack=0.0)

    def error(self, keys: Float[Tensor, "m n"], update: LowRank) -> float:
        """|D K - I| / |I|: how far the keys' outputs are from their values."""
        return interpolation_error(update.down.to(self.factor), keys.to(self.factor))


@dataclass(frozen=True)
class NullSpace:
    """AlphaEdit, equation 14, in the dual: Delta = R (I + A^T B)^{-1} B^T, A = P K, B = (rho I + A_p A_p^T)^{-1} A.

    P = I - U U^T removes the part in the protected directions U. These are far fewer than the free ones, so neither P
    nor a basis of the null space is ever formed. Everything is float64.
    """

    #: Eigenvectors of C whose eigenvalues reach the threshold.
    protected: Float64[Tensor, "m k"]
    rho: float
    #: Keys of earlier edits, projected; p may be 0.
    earlier: Float64[Tensor, "m p"]

    @classmethod
    def of(cls, second_moment: Float[Tensor, "m m"], threshold: float, rho: float) -> NullSpace:
        """`threshold` is a share of the largest eigenvalue."""
        return cls.beside(protected_directions(second_moment, threshold), rho)

    @classmethod
    def beside(cls, protected: Float64[Tensor, "m k"], rho: float) -> NullSpace:
        """The solver for directions that `protected_directions` gave, now or earlier."""
        return cls(protected, rho, protected.new_zeros(len(protected), 0))

    def protecting(self, keys: Float[Tensor, "m p"]) -> NullSpace:
        """The same, with keys of earlier edits, which the next one is to leave alone."""
        return replace(self, earlier=torch.cat([self.earlier, self._projected(keys)], dim=1))

    def solve(self, keys: Float[Tensor, "m n"], residual: Float[Tensor, "d n"]) -> LowRank:
        inside = self._projected(keys)
        return dual_solution(inside, woodbury(lambda right: right / self.rho, self.earlier, inside), residual)

    def _projected(self, keys: Float[Tensor, "m n"]) -> Float64[Tensor, "m n"]:
        """P K."""
        whole = keys.to(self.protected)
        return whole - self.protected @ (self.protected.T @ whole)

    def condition(self) -> float:
        """Condition number of rho I + A_p A_p^T."""
        most = float(torch.linalg.matrix_norm(self.earlier, 2)) if self.earlier.numel() else 0.0
        return 1 + most**2 / self.rho

    def error(self, keys: Float[Tensor, "m n"], update: LowRank) -> float:
        """How far an update is from solving its equations, as for Ridge, with projected keys."""
        inside, rows = self._projected(keys), update.down.to(self.protected)
        return relative_error(rows, self.rho * rows + (rows @ self.earlier) @ self.earlier.T, inside)


def protected_directions(second_moment: Float[Tensor, "m m"], threshold: float) -> Float64[Tensor, "m k"]:
    """Eigenvectors of C whose eigenvalues reach `threshold` times the largest.

    The other eigenvectors span the null space and are not computed. The CPU needs less than half the time of all m.
    """
    from scipy.linalg import eigh

    moment = second_moment.double().cpu()
    if not torch.isfinite(moment).all():
        raise EditError("The second moment C holds NaN or infinity. Check the corpus and the model's weights.")
    largest = _largest_eigenvalue(moment)
    if not largest > 0:
        raise EditError("The second moment C is zero. Check the corpus and the model's weights.")
    if not 0 < threshold <= 1:
        raise EditError(f"nullspace_threshold = {threshold} is a share: it must be greater than 0 and at most 1.")
    limit = threshold * largest
    vectors = torch.from_numpy(eigh(moment.numpy(), driver="evr", subset_by_value=(limit, math.inf))[1])
    if vectors.shape[1] == len(moment):
        raise EditError(f"No eigenvalue of C is below {threshold} of its largest. Raise nullspace_threshold.")
    return vectors.contiguous()


def _largest_eigenvalue(moment: Float64[Tensor, "m m"]) -> float:
    """The largest eigenvalue of a symmetric positive matrix, by Lanczos' method to full precision; 0 for zeros."""
    from scipy.sparse.linalg import eigsh

    if len(moment) < 3 or not moment.any():  # too small for Lanczos, or all zeros
        return float(torch.linalg.eigvalsh(moment)[-1])
    start = torch.randn(len(moment), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return float(eigsh(moment.numpy(), k=1, which="LA", v0=start.numpy(), return_eigenvectors=False)[0])


def woodbury(
    solve: Callable[[Tensor], Tensor], earlier: Float64[Tensor, "_ p"], right: Float64[Tensor, "m k"]
) -> Float64[Tensor, "m k"]:
    """(M + P P^T)^{-1} X, from a function that gives M^{-1} X, by a p x p system."""
    solved = solve(right)
    if not earlier.shape[1]:
        return solved
    spread = solve(earlier)
    gram = torch.eye(earlier.shape[1], dtype=earlier.dtype, device=earlier.device) + earlier.T @ spread
    correction: Tensor = torch.linalg.solve(gram, earlier.T @ solved)
    return solved - spread @ correction


def dual_solution(
    keys: Float64[Tensor, "m n"], solved: Float64[Tensor, "m n"], residual: Float[Tensor, "d n"], slack: float = 1.0
) -> LowRank:
    """R (slack I + K^T B)^{-1} B^T from K and B = M^{-1} K: an n x n system."""
    gram = slack * torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device) + keys.T @ solved
    down, info = torch.linalg.solve_ex(gram, solved.T)
    if int(info) or not torch.isfinite(down).all():
        raise EditError("The edit's linear system gave NaN: the keys are degenerate. Check for two equal requests.")
    return LowRank(residual.to(down), down)


def interpolation_error(rows: Float64[Tensor, "n m"], keys: Float64[Tensor, "m n"]) -> float:
    """|D K - I| / |I|."""
    product = rows @ keys
    wanted = torch.eye(len(product), dtype=product.dtype, device=product.device)
    return float((product - wanted).norm() / wanted.norm())


def relative_error(
    rows: Float64[Tensor, "n m"], product: Float64[Tensor, "n m"], keys: Float64[Tensor, "m n"]
) -> float:
    """|D M + (D K) K^T - K^T| / |K|, from D and D M."""
    left = product + (rows @ keys) @ keys.T - keys.T
    return float(left.norm() / keys.norm())


def _largest(apply: Callable[[Tensor], Tensor], like: Tensor, steps: int = 30) -> float:
    """The largest eigenvalue of a symmetric positive matrix, by power iteration."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(like), 1, generator=generator, dtype=torch.float64).to(like)
    size = 0.0
    for _ in range(steps):
        vector = apply(vector / vector.norm())
        size = float(vector.norm())
    return size
