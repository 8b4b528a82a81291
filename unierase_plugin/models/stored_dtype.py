"""The dtype of a checkpoint whose weights are worked on in float32: what is written has it.

On a CPU half precision is far slower than float32, so that a model is worked on in float32 there. Its weights lie on
the checkpoint's coarser grid all the same: what an edit or a training changed is rounded to it before it is measured,
so that the figures are those of the weights that are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: Attribute of a loaded model that holds it.
ATTRIBUTE = "unierase_stored_dtype"


def stored_dtype(model: Any) -> torch.dtype | None:
    """What the model's weights are written in; None where that is what they are in."""
    found = vars(model).get(ATTRIBUTE)
    return found if isinstance(found, torch.dtype) else None


def set_stored_dtype(model: Any, dtype: torch.dtype | None) -> None:
    """Notes on the model in which dtype its weights are written; None if they are written as they are."""
    setattr(model, ATTRIBUTE, dtype)


@torch.no_grad()
def round_to_stored(model: Any) -> None:
    """Gives every weight in float32 the value that it will have when it is written."""
    dtype = stored_dtype(model)
    if dtype is not None:
        for weight in _wider(model):
            weight.copy_(weight.to(dtype))


@contextmanager
def as_stored(model: Any) -> Iterator[None]:
    """The weights have inside the dtype that they are written in."""
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
