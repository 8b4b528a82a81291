"""The solvers by name, and their input. The module imports quickly: closed forms are imported when one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..hparams import UniEraseHyperParams

if TYPE_CHECKING:
    from torch import Tensor

    from .solve import Ridge, Solver


@dataclass(frozen=True)
class System:
    """The input for the solver of one block. m is the input width of the block's MLP output projection.

    For a block of E experts of inner width I, moments are (E, I, I), one of each expert, and keys have m = E I.
    """

    #: Second moment (m, m) of the keys of ordinary text.
    corpus: Tensor
    #: The same for the retain set; None without one.
    retain: Tensor | None
    hparams: UniEraseHyperParams
    #: Gives the directions (m, k) that a moment protects, for a threshold. Uses the cache if it can.
    directions: Callable[[Tensor, float], Tensor]

    def moment(self) -> Tensor:
        """(m, m): the sum of both second moments, each times its weight."""
        ordinary = self.hparams.mom2_update_weight * self.corpus
        return ordinary if self.retain is None else ordinary + self.hparams.retain_update_weight * self.retain

    @property
    def experts(self) -> int:
        """E; 0 if the block is no mixture of experts."""
        return len(self.corpus) if self.corpus.ndim == 3 else 0

    def of_expert(self, number: int) -> System:
        """The system of one expert alone."""
        retain = None if self.retain is None else self.retain[number]
        return replace(self, corpus=self.corpus[number], retain=retain)


#: Makes the solver of one block.
MakeSolver = Callable[[System], "Solver"]


def ridge(system: System) -> Solver:
    """MEMIT's solver: least squares over the edit's keys and values, weighed against the keys of ordinary text."""
    from .solve import Ridge

    if system.experts:
        return _of_experts(system, lambda number: Ridge.of(system.of_expert(number).moment()), exact=False)
    return Ridge.of(system.moment())


def null_space(system: System) -> Solver:
    """AlphaEdit's solver: uses only directions in which the keys of ordinary text are almost zero."""
    from .solve import NullSpace

    if not system.experts:
        return NullSpace.beside(_protected(system), system.hparams.L2)
    import torch

    from .solve_experts import ExpertsNullSpace

    nothing = torch.zeros(system.experts * system.corpus.shape[1], 0, dtype=torch.float64)
    return ExpertsNullSpace(
        nothing,
        system.hparams.L2,
        nothing,
        directions=lambda number: _protected(system.of_expert(number)),
        inner=system.corpus.shape[1],
    )


def exact(system: System) -> Solver:
    """ROME's solver: maps every key exactly to its value."""
    from .solve import Exact

    if system.experts:
        return _of_experts(system, lambda number: Exact.of(system.of_expert(number).moment()), exact=True)
    return Exact.of(system.moment())


def _of_experts(system: System, make: Callable[[int], Ridge], exact: bool) -> Solver:
    import torch

    from .solve_experts import ExpertsRidge

    inner = system.corpus.shape[1]
    none = torch.zeros(system.experts * inner, 0, dtype=torch.float64, device=system.corpus.device)
    return ExpertsRidge(make, inner, exact, none)


def _protected(system: System) -> Tensor:
    """The directions (m, k) that ordinary text uses; none for an expert that it never reached."""
    import torch

    weight, threshold = system.hparams.retain_update_weight, system.hparams.nullspace_threshold
    moment = system.corpus if system.retain is None else system.corpus + weight * system.retain
    if torch.equal(moment, moment[0, 0] * torch.eye(len(moment)).to(moment)):
        return moment.new_zeros(len(moment), 0, dtype=torch.float64)
    return system.directions(moment, threshold)


#: The solvers of this package.
SOLVERS: Mapping[str, MakeSolver] = MappingProxyType({"ridge": ridge, "null_space": null_space, "exact": exact})
