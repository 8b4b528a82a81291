"""Copies of weights as they were, and the one way to put them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class OriginalWeights:
    """Copies of parameters, or of one row of each. They lie where the parameters do, unless a device is named."""

    def __init__(self, parameters: Iterable[Tensor], row: int | None = None, device: str | None = None) -> None:
        """Takes the copies. A parameter that is named twice, as tied ones are, is copied once."""
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
    """Whatever is done to the parameters inside the block is undone at its end, to the bit, also by an exception."""
    originals = OriginalWeights(parameters)
    try:
        yield
    finally:
        originals.restore()
