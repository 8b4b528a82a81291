"""Copies of original weights, and the one way to restore them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class OriginalWeights:
    """Copies of parameters, or of one row of each. They are on the parameters' devices, unless a device is given."""

    def __init__(self, parameters: Iterable[Tensor], row: int | None = None, device: str | None = None) -> None:
        """Takes the copies. A parameter that occurs twice, such as a tied one, is copied once."""
        self._row = row
        chosen = {id(parameter): parameter for parameter in parameters}.values()
        self._kept = [(parameter, self._part(parameter).detach().to(device, copy=True)) for parameter in chosen]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copies back, to the bit."""
        for parameter, copy in self._kept:
            self._part(parameter).copy_(copy)

    def _part(self, parameter: Tensor) -> Tensor:
        return parameter if self._row is None else parameter[self._row]


@contextmanager
def restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Restores the parameters at the end of the block, to the bit, also after an exception."""
    originals = OriginalWeights(parameters)
    try:
        yield
    finally:
        originals.restore()
