"""Changes a model's weights for a while: rounding, pruning, and putting back to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..models.architecture import Architecture, stores_input_first


@contextmanager
def trainable(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for the chosen parameters alone; afterwards the model asks for those it did before, and holds none."""
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in chosen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, trained in flags:
            weight.grad = None
            weight.requires_grad_(trained)


def linear_maps(arch: Architecture) -> list[tuple[str, Any]]:
    """(name, module) of every linear map inside the blocks: what quantisation rounds; embeddings and head are left."""
    inside = {id(module) for block in arch.blocks for module in block.modules()}
    return [
        (name, module)
        for name, module in arch.model.named_modules()
        if id(module) in inside
        and not isinstance(module, nn.Embedding)
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim == 2
    ]


@torch.no_grad()
def change_inputs_last(module: Any, change: Any) -> None:
    """Puts `change(weight as (out, in))` in the place of a linear map's weight."""
    weight = module.weight
    turned = weight.t() if stores_input_first(module) else weight
    turned.copy_(change(turned.float()))


def rounded(weight: Tensor, bits: int, group: int = 0) -> Tensor:
    """A matrix (out, in) rounded to 2^bits levels between the least and the largest of each group of inputs.

    group: inputs that share a scale, 0 for a whole row. No entry moves by more than half a step, (max - min) /
    (2^bits - 1) / 2 of its group. Constant groups stay as they are.
    """
    width = weight.shape[1]
    size = group or width
    padded = nn.functional.pad(weight, (0, -width % size), mode="replicate")
    grouped = rearrange(padded, "out (group input) -> out group input", input=size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    level = ((grouped - low) / torch.where(step > 0, step, torch.ones_like(step))).round()
    joined: Tensor = rearrange(low + level * step, "out group input -> out (group input)")
    return joined[:, :width]


def pruned(weight: Tensor, share: float) -> Tensor:
    """A matrix with the given share of its entries, those of the least magnitude, set to zero."""
    count = int(share * weight.numel())
    if count == 0:
        return weight
    # NumPy's selection takes a thirtieth of the time of torch's on a CPU.
    smallest = np.argpartition(weight.abs().flatten().cpu().numpy(), count - 1)[:count]
    flat = weight.clone().flatten()
    flat[torch.from_numpy(smallest).to(weight.device)] = 0
    return flat.reshape(weight.shape)
