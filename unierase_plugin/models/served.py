"""Tries on a few tokens what the passes of an edit rely on, before anything takes time.

It checks where a block's input is, what the block returns, what enters its projection, and whether a padded pass, one
that starts at a block, and one that goes on from earlier tokens give the logits of a plain pass. A model that lacks one
of these is refused with that reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..errors import ArchitectureError, reason
from .architecture import Architecture
from .earlier import CUTS, ROWS, agree, evaluating, in_float32
from .experts import Experts
from .prefix import cache_prefixes, continue_from
from .trace import pad, run_blocks

#: Two texts of three tokens, on which the shapes of a block's parts are looked at.
ALIKE = ((1, 2, 3), (3, 1, 2))


@torch.no_grad()
def check_served(arch: Architecture, starts: Sequence[int] = ()) -> None:
    """Raises ArchitectureError with the reason if a pass of an edit would fail or give wrong results.

    starts: blocks at which passes begin; the middle one is tried too.
    """
    model = arch.model
    with evaluating(model):
        _check_parts(arch)
        with in_float32(model) as exact:
            try:
                found = list(_ways(arch, {len(arch.blocks) // 2, *starts}))
            except ArchitectureError:
                raise
            except Exception as error:  # whatever a model's own code raises
                raise ArchitectureError(
                    f"{type(model).__name__} does not run as an edit's passes run it: {type(error).__name__}: "
                    f"{reason(error)}. UniErase edits decoder-only models whose blocks run one after another."
                ) from error
        for way, logits, wanted in found:
            if not agree(logits, wanted, exact):
                raise ArchitectureError(
                    f"{type(model).__name__} gives other logits when a pass {way}, so that an edit cannot be computed. "
                    "UniErase edits decoder-only models whose blocks run one after another and read earlier tokens."
                )


def _ways(arch: Architecture, starts: set[int]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What is said of a way to run the model, its logits (tokens, V), and those of a plain pass; for each text."""
    plain = [arch.model(torch.tensor([row], device=arch.device), use_cache=False).logits[0] for row in ROWS]
    batch = pad(ROWS, 0, "right", arch.device)
    for way, logits in (
        ("is padded on the right", run_blocks(arch, batch).logits),
        *((f"begins at block {start}", _from_block(arch, start)) for start in sorted(starts) if start),
    ):
        yield from ((way, row[: len(wanted)], wanted) for row, wanted in zip(logits, plain, strict=True))
    prefix = cache_prefixes(arch, [row[:cut] for row, cut in zip(ROWS, CUTS, strict=True)], 0)
    suffix = continue_from(prefix, [row[cut:] for row, cut in zip(ROWS, CUTS, strict=True)], 0)
    logits = run_blocks(arch, suffix, cache=prefix.fresh()).logits
    for row, wanted, cut in zip(logits, plain, CUTS, strict=True):
        yield "goes on from earlier tokens", row[: len(wanted) - cut], wanted[cut:]


def _from_block(arch: Architecture, start: int) -> Tensor:
    batch = pad(ROWS, 0, "right", arch.device)
    below = run_blocks(arch, batch, last=start - 1).hidden
    logits: Tensor = run_blocks(arch, batch, first=start, hidden=below).logits
    return logits


def _check_parts(arch: Architecture) -> None:
    """Checks the shapes of everything that enters and leaves each block and projection."""
    seen = _parts(arch, ALIKE)
    rows, columns = len(ALIKE), len(ALIKE[0])
    for layer, name in enumerate(arch.projection_names):
        spots: dict[str, list[tuple[int, ...]]] = {
            f"the input of block {layer}": [(rows, columns, arch.hidden_size)],
            f"the output of block {layer}": [(rows, columns, arch.hidden_size)],
        }
        if name:
            # Experts read what the router read, not the input of one projection.
            projection = arch.projections[layer]
            if isinstance(projection, Experts):
                times = 1 if projection.order else projection.count
                spots[f"the input of {name}"] = [(times * rows * columns, arch.hidden_size)]
            else:
                width = arch.mlp_width(layer)
                spots[f"the input of {name}"] = [(rows, columns, width), (rows * columns, width)]
        for spot, shapes in spots.items():
            found = seen.get(spot)
            if not isinstance(found, Tensor) or tuple(found.shape) not in shapes:
                if spot not in seen:
                    raise ArchitectureError(
                        f"In {type(arch.model).__name__}, block {layer} or its projection does not run on text alone: "
                        "no pass can begin or end there. UniErase edits models whose blocks all run on text."
                    )
                what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ArchitectureError(
                    f"In {type(arch.model).__name__}, {spot} is {what} for {rows} texts of {columns} tokens, not "
                    f"{list(shapes[0])}: an edit could not tell whose token is whose. UniErase edits decoder-only "
                    "models whose blocks take and give (texts, tokens, width), not several streams for each token."
                )
    inputs = [f"the input of {arch.projection_names[layer]}" for layer in arch.editable]
    flat = [spot for spot in inputs if seen[spot].ndim == 2]
    if flat:
        alone = _parts(arch, ALIKE[-1:])
        for spot in flat:
            single = alone[spot].reshape(-1, seen[spot].shape[1])[-columns:]
            if not agree(seen[spot][-columns:], single, seen[spot].dtype == torch.float32):
                raise ArchitectureError(
                    f"In {type(arch.model).__name__}, {spot} does not hold one text's tokens after another: an edit "
                    "could not tell whose token is whose. UniErase edits models that keep the order of tokens."
                )


def _parts(arch: Architecture, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What enters and leaves each block and projection in a plain pass."""
    seen: dict[str, Any] = {}

    def entering(name: str) -> Any:
        def look(module: Any, args: Any, kwargs: Any) -> None:
            seen[name] = args[0] if args else kwargs.get("hidden_states")

        return look

    def leaving(name: str) -> Any:
        def look(module: Any, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, (tuple, list)) else output

        return look

    with ExitStack() as stack:
        watched = [(block, f"block {layer}") for layer, block in enumerate(arch.blocks)]
        for block, name in watched:
            stack.callback(block.register_forward_hook(leaving(f"the output of {name}")).remove)
        readers = [(arch.projection_module(at), arch.projection_names[at]) for at in arch.editable]
        for module, name in (*watched, *readers):
            look = entering(f"the input of {name}")
            stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
        arch.model(torch.tensor(texts, device=arch.device), use_cache=False)
    return seen
