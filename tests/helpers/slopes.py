"""Checks a gradient against a difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unierase_plugin.models.architecture import Architecture
from unierase_plugin.models.trace import TokenBatch, run_blocks


def check_slope(arch: Architecture, prefix: Any, suffix: TokenBatch) -> None:
    """The gradient of a loss with respect to the input of block 2, through a cache, is the slope along itself.

    suffix: three sequences that go on from `prefix` (`prefix.continue_from`), of 7, 4 and 1 tokens
    """
    where = (torch.tensor([0, 1, 2]), torch.tensor([6, 3, 0]))
    hidden = run_blocks(arch, suffix, last=1, cache=prefix.fresh()).hidden.detach()

    def loss(state: Tensor) -> Tensor:
        trace = run_blocks(arch, suffix, first=2, hidden=state, cache=prefix.fresh(), head_at=where)
        found: Tensor = trace.logits.log_softmax(-1)[:, 11].sum()
        return found

    state = hidden.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(state), state)
    direction = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        slope = float(loss(hidden + step * direction) - loss(hidden - step * direction)) / (2 * step)
    assert slope == pytest.approx(float(gradient.norm()), rel=2e-2)
