"""Which experts each token of a text is sent to, and how many tokens an edit sends to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .architecture import Architecture
from .experts import Experts, Routing
from .trace import TokenBatch, pad, run_batches, run_blocks


@torch.no_grad()
def routes(
    arch: Architecture, sequences: Sequence[Sequence[int]], layers: Sequence[int], *, max_tokens: int, pad_id: int
) -> dict[int, Tensor]:
    """The experts (N, k), ascending, of every token of the sequences, by layer. Layers without experts are left out."""
    mixed = {layer: each for layer in layers if isinstance(each := arch.projections[layer], Experts)}
    found: dict[int, dict[int, Tensor]] = {layer: {} for layer in mixed}

    def look(batch: TokenBatch, rows: list[int], layer: int, routing: Routing) -> None:
        index = routing.index.sort(dim=1).values.cpu().reshape(*batch.ids.shape, -1)
        found[layer].update({row: index[at, : len(sequences[row])] for at, row in enumerate(rows)})

    def run(rows: list[int]) -> None:
        batch = pad([sequences[row] for row in rows], pad_id, "right", arch.device)
        handles = [experts.watch(partial(look, batch, rows, layer)) for layer, experts in mixed.items()]
        try:
            run_blocks(arch, batch, last=max(mixed))
        finally:
            for handle in handles:
                handle.remove()

    if mixed:
        run_batches(sequences, max_tokens, run)
    return {layer: torch.cat([each[row] for row in range(len(sequences))]) for layer, each in found.items()}


def route_changes(before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> dict[str, Any]:
    """The number of tokens, and the share of those with other experts than before: in any block, and by block."""
    others = {layer: (before[layer] != after[layer]).any(1) for layer in before}
    return {
        "tokens": len(next(iter(before.values()))),
        "changed": float(torch.stack(list(others.values())).any(0).float().mean()),
        "by_block": {str(layer): float(each.float().mean()) for layer, each in others.items()},
    }
