"""Temporary changes of a model's weights: rounding and pruning. Afterwards every bit is as before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..models.architecture import Architecture, stores_input_first
from ..models.experts import Experts


@contextmanager
def trainable(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, only the chosen parameters have gradients. Afterwards `requires_grad` is as before, without gradients."""
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
    """(name, module) of every linear map inside the blocks. Quantisation rounds these, not embeddings and head.

    Weights stacked over experts are in `expert_weights`, and routers are no linear maps.
    """
    inside = {id(module) for block in arch.blocks for module in block.modules()}
    routed = any(isinstance(projection, Experts) for projection in arch.projections)
    return [
        (name, module)
        for name, module in arch.model.named_modules()
        if id(module) in inside
        and not isinstance(module, nn.Embedding)
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim == 2
        and (isinstance(module, nn.Linear) or not routed)
    ]


def expert_weights(arch: Architecture) -> list[tuple[Tensor, bool]]:
    """Every weight that is stacked over routed experts, and whether it has its inputs before its outputs."""
    return [
        (weight, experts.input_first)
        for experts in arch.projections
        if isinstance(experts, Experts)
        for weight in experts.module.parameters(recurse=False)
        if weight.ndim == 3
    ]


@torch.no_grad()
def change_each_expert(weight: Tensor, input_first: bool, change: Any) -> None:
    """Replaces each expert's matrix by `change(matrix)`, where the matrix is given as (out, in)."""
    for matrix in weight:
        turned = matrix.t() if input_first else matrix
        turned.copy_(change(turned.float()))


@torch.no_grad()
def change_inputs_last(module: Any, change: Any) -> None:
    """Replaces the weight of a linear map by `change(weight)`, where the weight is given as (out, in)."""
    weight = module.weight
    turned = weight.t() if stores_input_first(module) else weight
    turned.copy_(change(turned.float()))


def rounded(weight: Tensor, bits: int, group: int = 0) -> Tensor:
    """Rounds a matrix (out, in) to 2^bits levels between the smallest and the largest entry of each group of inputs.

    group: how many inputs share a scale; 0 for a whole row. No entry moves by more than half a step of its group,
    (max - min) / (2^bits - 1) / 2. Constant groups stay as they are.
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
    """Sets the given share of a matrix's entries to zero, the smallest ones by magnitude."""
    count = int(share * weight.numel())
    if count == 0:
        return weight
    # NumPy's selection takes a thirtieth of the time of torch's on a CPU.
    smallest = np.argpartition(weight.abs().flatten().cpu().numpy(), count - 1)[:count]
    flat = weight.clone().flatten()
    flat[torch.from_numpy(smallest).to(weight.device)] = 0
    return flat.reshape(weight.shape)
