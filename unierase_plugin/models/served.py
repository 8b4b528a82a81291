"""Tries on a few tokens what the passes of an edit rely on, before anything takes time.

It checks where a block's input is, what the block returns, what enters its projection, and whether a pass can start at
a block or continue from keys and values of earlier tokens. A model that lacks one of these is refused with that reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArchitectureError, reason
from .architecture import Architecture
from .prefix import cache_prefixes, continue_from
from .recurrent import ROWS, evaluating, refuse_recurrent
from .trace import TokenBatch, pad, run_blocks

#: How far the logits of two ways may differ, in standard deviations of all logits: in float32, and in coarser types.
EXACT, COARSE = 0.01, 0.3


def check_served(arch: Architecture) -> None:
    """Raises ArchitectureError with the reason if a pass of an edit would fail or give wrong results."""
    model = arch.model
    with evaluating(model), torch.no_grad():
        _check_parts(arch)
        refuse_recurrent(model)
        try:
            batch = pad(ROWS, 0, "left", arch.device)
            whole = _logits(arch, batch)
            ways = {
                f"begins at block {len(arch.blocks) // 2}": _from_the_middle(arch, batch),
                "goes on from keys and values of earlier tokens": _from_a_prefix(arch),
            }
        except Exception as error:  # whatever a model's own code raises
            raise ArchitectureError(
                f"{type(model).__name__} does not run as an edit's passes run it: {type(error).__name__}: "
                f"{reason(error)}. UniErase edits decoder-only models of like attention blocks."
            ) from error
        allowed = (EXACT if whole.dtype == torch.float32 else COARSE) * whole.float().std()
        for way, found in ways.items():
            # Another check reports NaN in the weights.
            if bool((found[:, -1].float() - whole[:, -1].float()).abs().max() > allowed):
                raise ArchitectureError(
                    f"{type(model).__name__} gives other logits when a pass {way}, so that an edit cannot be computed. "
                    "UniErase edits decoder-only models of like attention blocks."
                )


def _check_parts(arch: Architecture) -> None:
    """Checks the shapes of everything that enters and leaves each block and projection."""
    seen: dict[str, Any] = {}

    def entering(name: str) -> Any:
        def look(module: Any, args: Any, kwargs: Any) -> None:
            seen[name] = args[0] if args else kwargs.get("hidden_states")

        return look

    def leaving(name: str) -> Any:
        return lambda module, args, output: seen.update({name: output})

    handles = []
    for layer, (block, projection) in enumerate(zip(arch.blocks, arch.projections, strict=True)):
        module: Any = projection
        handles += [
            block.register_forward_pre_hook(entering(f"the input of block {layer}"), with_kwargs=True),
            block.register_forward_hook(leaving(f"the output of block {layer}")),
            module.register_forward_pre_hook(
                entering(f"the input of {arch.projection_names[layer]}"), with_kwargs=True
            ),
        ]
    try:
        arch.model(torch.tensor(ROWS, device=arch.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    rows, columns = len(ROWS), len(ROWS[0])
    for layer, name in enumerate(arch.projection_names):
        spots = {
            f"the input of block {layer}": arch.hidden_size,
            f"the output of block {layer}": arch.hidden_size,
            f"the input of {name}": arch.mlp_width(layer),
        }
        for spot, width in spots.items():
            found = seen.get(spot)
            if isinstance(found, tuple) and arch.blocks_return_tuple and "output" in spot:
                found = found[0]
            wanted = (rows, columns, width)
            if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
                what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ArchitectureError(
                    f"In {type(arch.model).__name__}, {spot} is {what} for {rows} texts of {columns} tokens, not "
                    f"{list(wanted)}: an edit could not tell whose token is whose. UniErase edits decoder-only models "
                    "whose blocks take and give (texts, tokens, width)."
                )


def _logits(arch: Architecture, batch: TokenBatch, **way: Any) -> Tensor:
    found: Tensor = run_blocks(arch, batch, **way).logits
    return found


def _from_the_middle(arch: Architecture, batch: TokenBatch) -> Tensor:
    middle = len(arch.blocks) // 2
    if not middle:
        return _logits(arch, batch)
    below = run_blocks(arch, batch, last=middle - 1).hidden
    return _logits(arch, batch, first=middle, hidden=below)


def _from_a_prefix(arch: Architecture) -> Tensor:
    prefix = cache_prefixes(arch, [row[:-1] for row in ROWS], 0)
    return _logits(arch, continue_from(prefix, [row[-1:] for row in ROWS], 0), cache=prefix.fresh())
