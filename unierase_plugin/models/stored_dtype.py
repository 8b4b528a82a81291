"""The checkpoint's dtype of a model that is edited in float32. The output is written in it.

On a CPU, half precision is far slower than float32, so a model is edited in float32 there. Still, its output has the
checkpoint's coarser dtype. Changed weights are rounded to it before they are measured, so the figures are those of the
written weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: The attribute of a loaded model that has this dtype.
ATTRIBUTE = "unierase_stored_dtype"


def stored_dtype(model: Any) -> torch.dtype | None:
    """The dtype in which the model's weights are written; None if it is the dtype that they have."""
    found = vars(model).get(ATTRIBUTE)
    return found if isinstance(found, torch.dtype) else None


def set_stored_dtype(model: Any, dtype: torch.dtype | None) -> None:
    """Notes on the model the dtype in which its weights are written; None if it is the dtype that they have."""
    setattr(model, ATTRIBUTE, dtype)


@torch.no_grad()
def round_to_stored(model: Any) -> None:
    """Gives every float32 weight the value that it will have once written."""
    dtype = stored_dtype(model)
    if dtype is not None:
        for weight in _wider(model):
            weight.copy_(weight.to(dtype))


@contextmanager
def as_stored(model: Any) -> Iterator[None]:
    """Inside, the weights have the dtype in which they are written."""
    dtype = stored_dtype(model)
    if dtype is None:
        yield
        return
    kept = [(weight, weight.data) for weight in _wider(model)]
    said = getattr(model.config, "dtype", None)
    try:
        for weight, data in kept:
            weight.data = data.to(dtype)
        yield
    finally:
        for weight, data in kept:
            weight.data = data
        model.config.dtype = said  # saving writes it down


def _wider(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.dtype == torch.float32]
