"""The solvers by name, and their input. The module imports quickly: closed forms are imported when one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..hparams import UniEraseHyperParams

if TYPE_CHECKING:
    from torch import Tensor

    from .solve import Solver


@dataclass(frozen=True)
class System:
    """The input for the solver of one block. m is the input width of the block's MLP output projection."""

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


#: Makes the solver of one block.
MakeSolver = Callable[[System], "Solver"]


def ridge(system: System) -> Solver:
    """MEMIT's solver: least squares over the edit's keys and values, weighed against the keys of ordinary text."""
    from .solve import Ridge

    return Ridge.of(system.moment())


def null_space(system: System) -> Solver:
    """AlphaEdit's solver: uses only directions in which the keys of ordinary text are almost zero."""
    from .solve import NullSpace

    weight, threshold = system.hparams.retain_update_weight, system.hparams.nullspace_threshold
    moment = system.corpus if system.retain is None else system.corpus + weight * system.retain
    return NullSpace.beside(system.directions(moment, threshold), system.hparams.L2)


def exact(system: System) -> Solver:
    """ROME's solver: maps every key exactly to its value."""
    from .solve import Exact

    return Exact.of(system.moment())


#: The solvers of this package.
SOLVERS: Mapping[str, MakeSolver] = MappingProxyType({"ridge": ridge, "null_space": null_space, "exact": exact})
