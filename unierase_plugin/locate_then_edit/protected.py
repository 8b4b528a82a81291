"""Keys of facts to keep, each as its own constraint: their positions, their weight, and how far an edit moves them.

In a mean over all tokens of the facts to keep, a single key has almost no weight. Here each key k of a position at
which an edit of that fact would act enters the closed form separately, as w k k^T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.architecture import Architecture
from ..models.products import fast_linear_maps
from ..models.trace import pad, run_batches, run_blocks
from .solve import LowRank

#: How many of the facts that moved most the report names.
WORST = 5


@dataclass(frozen=True)
class KeptPrompt:
    """A tokenised question to keep, the positions at which an edit could act on it, and the number of its fact."""

    ids: tuple[int, ...]
    positions: range
    fact: int


@dataclass(frozen=True)
class ProtectedKeys:
    """Keys (m, p) by layer, float32, and the fact (p,) to which each key belongs."""

    keys: Mapping[int, Tensor]
    facts: Tensor


@fast_linear_maps()
@torch.no_grad()
def protected_keys(
    arch: Architecture, prompts: Sequence[KeptPrompt], layers: Sequence[int], *, max_tokens: int, pad_id: int
) -> ProtectedKeys:
    """The keys, from one pass up to the last edited block with the present weights; columns in the prompts' order."""
    # Attention is causal: tokens after the last needed position do not matter.
    sequences = [prompt.ids[: prompt.positions.stop] for prompt in prompts]
    found: dict[int, dict[int, Tensor]] = {}

    def run(rows: list[int]) -> None:
        batch = pad([sequences[row] for row in rows], pad_id, "right", arch.device)
        trace = run_blocks(arch, batch, last=layers[-1], inputs_of=layers)
        for at, row in enumerate(rows):
            places = list(prompts[row].positions)
            found[row] = {layer: trace.projection_inputs[layer][at, places].float().cpu() for layer in layers}

    run_batches(sequences, max_tokens, run)
    keys = {layer: torch.cat([found[row][layer] for row in range(len(prompts))]).T.contiguous() for layer in layers}
    return ProtectedKeys(keys, torch.tensor([prompt.fact for prompt in prompts for _ in prompt.positions]))


@torch.no_grad()
def moved(arch: Architecture, updates: Mapping[int, LowRank], protected: ProtectedKeys) -> dict[int, Tensor]:
    """|Delta k| / |W k| of every protected key, (p,) by layer. W is the present weight."""
    out: dict[int, Tensor] = {}
    for layer, update in updates.items():
        keys = protected.keys[layer]
        before = arch.matrix(layer).float().cpu() @ keys
        change = update.up.float() @ (update.down.float() @ keys)
        out[layer] = change.norm(dim=0) / before.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    return out


def moved_figures(by_layer: Mapping[int, Tensor], facts: Tensor, name: Callable[[int], str]) -> dict[str, object]:
    """Median and largest move by layer, and the names of the facts whose worst key moved most."""
    worst = torch.stack(list(by_layer.values())).amax(0)
    per_fact = torch.zeros(int(facts.max()) + 1).scatter_reduce_(0, facts, worst, "amax")
    order = per_fact.argsort(descending=True, stable=True)[:WORST].tolist()
    return {
        "keys": len(facts),
        "median": {str(layer): float(shares.median()) for layer, shares in by_layer.items()},
        "largest": {str(layer): float(shares.max()) for layer, shares in by_layer.items()},
        "worst": [{"fact": name(fact), "moved": float(per_fact[fact])} for fact in order],
    }
