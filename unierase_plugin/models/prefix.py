"""Splits sequences at a position. The part before it runs once and is kept; the rest runs as often as needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .architecture import Architecture
from .trace import TokenBatch, pad, run_blocks


@dataclass(frozen=True)
class PrefixCache:
    """Attention keys and values of prefixes, left-padded to width P: (B, heads, P, head size) for each block."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    #: (B, P): 1 for a real token.
    mask: Tensor

    def fresh(self) -> Any:
        """A transformers cache that starts with these prefixes. It can grow without changing them."""
        if not self.keys:
            return None
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, layer)
        return cache

    def select(self, rows: Tensor) -> PrefixCache:
        """The prefixes of some rows, no wider than the longest of them."""
        mask = self.mask[rows.to(self.mask.device)]
        cut = mask.shape[1] - int(mask.sum(1).max())
        if cut == mask.shape[1]:
            return PrefixCache((), (), mask[:, cut:])

        def pick(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor[rows.to(tensor.device), :, cut:] for tensor in tensors)

        return PrefixCache(pick(self.keys), pick(self.values), mask[:, cut:])


@torch.no_grad()
def cache_prefixes(arch: Architecture, prefixes: Sequence[Sequence[int]], pad_id: int) -> PrefixCache:
    """Runs the prefixes once, without logits. Prefixes may be empty."""
    batch = pad(prefixes, pad_id, "left", arch.device)
    if batch.ids.shape[1] == 0:
        return PrefixCache((), (), batch.mask)
    from transformers import DynamicCache

    cache = DynamicCache()
    nowhere = torch.zeros(1, dtype=torch.long)
    run_blocks(arch, batch, cache=cache, head_at=(nowhere, nowhere))
    layers: list[Any] = cache.layers
    return PrefixCache(tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers), batch.mask)


def continue_from(prefix: PrefixCache, suffixes: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
    """The suffixes, right-padded, with positions after their prefixes."""
    batch = pad(suffixes, pad_id, "right", prefix.mask.device)
    mask = torch.cat([prefix.mask, batch.mask], dim=1)
    return TokenBatch(batch.ids, mask, prefix.mask.sum(1, keepdim=True) + batch.positions)


def select_suffixes(prefix: PrefixCache, suffix: TokenBatch, rows: Tensor) -> TokenBatch:
    """Some rows of a batch from `continue_from`, no wider than the longest of them, after their own prefixes."""
    rows = rows.to(suffix.ids.device)
    own = suffix.mask[rows, -suffix.ids.shape[1] :]
    width = int(own.sum(1).max())
    mask = torch.cat([prefix.mask, own[:, :width]], dim=1)
    return TokenBatch(suffix.ids[rows, :width], mask, suffix.positions[rows, :width])
