"""Equal retention: edited weights are mixed back towards the original ones until enough is kept.

W(alpha) = W0 + alpha (W - W0), alpha in [0, 1], as the calibration of Wang et al. 2025 (UWC, arXiv 2406.09179). So
forgetting is compared where all methods keep equally much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Match:
    """The alpha at which a method keeps enough."""

    alpha: float
    #: What is kept at that alpha, relative to before.
    retention: float
    #: (alpha, retention) of every try, in order.
    tried: tuple[tuple[float, float], ...]


def calibrate(retention: Callable[[float], float], target: float, steps: int, whole: float | None = None) -> Match:
    """The largest alpha whose retention is at least `target`, by bisection of [0, 1] in so many steps.

    whole: the retention at 1, if it is known; it is then not measured again.

    Alpha is 1 if the whole edit keeps enough, and 0, the unedited model, if no mixture does. Enough is kept at the
    result, and not at 2^-steps above it. The result is unique only if retention falls with alpha.
    """
    tried: dict[float, float] = {1.0: retention(1.0) if whole is None else whole}
    low, high = 0.0, 1.0
    if tried[1.0] >= target:
        low = 1.0
    else:
        for _ in range(steps):
            middle = (low + high) / 2
            tried[middle] = retention(middle)
            low, high = (middle, high) if tried[middle] >= target else (low, middle)
    if low not in tried:
        tried[low] = retention(low)
    return Match(low, tried[low], tuple(tried.items()))


class Mixture:
    """An edited model whose weights can be set to any mixture of the original and the edited ones."""

    def __init__(self, model: Any, original: Any) -> None:
        """Matches parameters by name. Rows that the edit added have no original, and stay as they are."""
        before = dict(original.named_parameters())
        self._changed: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            end = parameter.detach().clone()
            start = _with_rows(before[name].detach().to(end.device, end.dtype), end)
            if not torch.equal(start, end):
                self._changed.append((parameter, start, end))

    def __bool__(self) -> bool:
        """Whether there is anything to mix."""
        return bool(self._changed)

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Sets the weights to W0 + alpha (W - W0). At 0 and 1 they equal the given ones to the bit."""
        for parameter, start, end in self._changed:
            if alpha in (0.0, 1.0):
                parameter.copy_(end if alpha else start)
            else:
                parameter.copy_(torch.lerp(start.float(), end.float(), alpha))


def _with_rows(start: Tensor, end: Tensor) -> Tensor:
    """The original, with the rows that the edited matrix has beyond it."""
    if start.shape == end.shape:
        return start
    return torch.cat([start, end[len(start) :]]) if len(start) < len(end) else start[: len(end)]
