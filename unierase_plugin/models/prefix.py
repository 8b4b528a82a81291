"""Splits sequences at a position. The part before it runs once and is kept; the rest runs as often as needed.

What is kept depends on the model: keys and values, the states of its recurrent blocks as well, or, where the model
cannot continue from these, the tokens themselves (`Architecture.earlier`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .architecture import Architecture
from .earlier import CUTS, ROWS, agree, evaluating, in_float32, keeps_plain_layers
from .trace import EarlierTokens, TokenBatch, pad, run_blocks


@dataclass(frozen=True)
class PrefixCache(ABC):
    """What is kept of prefixes, left-padded to width P."""

    #: (B, P): 1 for a real token.
    mask: Tensor

    @abstractmethod
    def fresh(self) -> Any:
        """What `run_blocks` takes as `cache`, starting with these prefixes. It can grow without changing them."""

    @abstractmethod
    def select(self, rows: Tensor) -> PrefixCache:
        """The prefixes of some rows: their numbers, or a mask over rows."""


@dataclass(frozen=True)
class KeysAndValues(PrefixCache):
    """Attention keys and values of prefixes: (B, heads, P, head size) for each block; none at all if P is 0."""

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()

    def fresh(self) -> Any:
        if not self.keys:
            return None
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, layer)
        return cache

    def select(self, rows: Tensor) -> PrefixCache:
        """As wide as the longest prefix that is left."""
        mask = self.mask[rows.to(self.mask.device)]
        cut = mask.shape[1] - int(mask.sum(1).max())
        if cut == mask.shape[1]:
            return KeysAndValues(mask[:, cut:])

        def pick(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor[rows.to(tensor.device), :, cut:] for tensor in tensors)

        return KeysAndValues(mask[:, cut:], pick(self.keys), pick(self.values))


@dataclass(frozen=True)
class States(PrefixCache):
    """A cache of transformers with the states of recurrent blocks. A state has no columns, so no selection cuts any."""

    cache: Any

    def fresh(self) -> Any:
        cache = _copied(self.cache)
        for layer in cache.layers:
            for kind in ("conv", "recurrent"):
                update = getattr(layer, f"update_{kind}_state", None)
                if update is not None:
                    setattr(layer, f"update_{kind}_state", partial(_updated, layer, f"{kind}_states", update))
        return cache

    def select(self, rows: Tensor) -> PrefixCache:
        rows = rows.to(self.mask.device)
        numbers = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        mask = self.mask[numbers]
        if not mask.any():
            return KeysAndValues(mask[:, :0])
        cache = _copied(self.cache)
        cache.reorder_cache(numbers)
        return States(mask, cache)


def _copied(cache: Any) -> Any:
    """A cache with states of its own. Keys and values are shared: they grow by concatenation."""
    from transformers.cache_utils import DynamicLayer

    shared = [each for layer in cache.layers if isinstance(layer, DynamicLayer) for each in (layer.keys, layer.values)]
    return copy.deepcopy(cache, {id(each): each for each in shared if isinstance(each, Tensor)})


def _updated(layer: Any, name: str, update: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Updates a state in memory of its own: the layer writes in place, and a backward pass needs what was there."""
    states = getattr(layer, name)
    if isinstance(states, dict):
        states.update({at: state.clone() for at, state in states.items() if state is not None})
    elif states is not None:
        setattr(layer, name, states.clone())
    return update(*args, **settings)


@dataclass(frozen=True)
class Tokens(PrefixCache):
    """The prefixes themselves. They run again with every pass."""

    earlier: EarlierTokens

    def fresh(self) -> Any:
        return self.earlier

    def select(self, rows: Tensor) -> PrefixCache:
        rows = rows.to(self.mask.device)
        mask = self.mask[rows]
        cut = mask.shape[1] - int(mask.sum(1).max())
        if cut == mask.shape[1]:
            return KeysAndValues(mask[:, cut:])
        return Tokens(mask[:, cut:], EarlierTokens(self.earlier.ids[rows, cut:], mask[:, cut:]))


def cache_prefixes(arch: Architecture, prefixes: Sequence[Sequence[int]], pad_id: int) -> PrefixCache:
    """Runs the prefixes once, without logits. Prefixes may be empty."""
    batch = pad(prefixes, pad_id, "left", arch.device)
    if batch.ids.shape[1] == 0:
        return KeysAndValues(batch.mask)
    return KINDS[arch.earlier](arch, batch)


@torch.no_grad()
def _keys_and_values(arch: Architecture, batch: TokenBatch) -> PrefixCache:
    from transformers import DynamicCache

    layers: list[Any] = _filled(arch, batch, DynamicCache()).layers
    return KeysAndValues(batch.mask, tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers))


@torch.no_grad()
def _states(arch: Architecture, batch: TokenBatch) -> PrefixCache:
    from transformers import DynamicCache

    return States(batch.mask, _filled(arch, batch, DynamicCache(config=arch.model.config)))


def _tokens(arch: Architecture, batch: TokenBatch) -> PrefixCache:
    return Tokens(batch.mask, EarlierTokens(batch.ids, batch.mask))


def _filled(arch: Architecture, batch: TokenBatch, cache: Any) -> Any:
    nowhere = torch.zeros(1, dtype=torch.long)
    run_blocks(arch, batch, cache=cache, head_at=(nowhere, nowhere))
    return cache


#: What is kept of prefixes, by the name that `Architecture.earlier` gives it.
KINDS: dict[str, Callable[[Architecture, TokenBatch], PrefixCache]] = {
    "keys and values": _keys_and_values,
    "states": _states,
    "tokens": _tokens,
}


def kind_that_fits(arch: Architecture) -> str:
    """The quickest kind whose passes give the logits of whole texts; "tokens" if none does. It is tried on few tokens.

    It runs the model in evaluation mode, and leaves nothing behind.
    """
    model = arch.model
    kind = "keys and values" if keeps_plain_layers(model) else "states"
    with evaluating(model), in_float32(model) as exact, torch.no_grad():
        try:
            whole = run_blocks(arch, pad(ROWS, 0, "right", arch.device)).logits
            batch = pad([row[:cut] for row, cut in zip(ROWS, CUTS, strict=True)], 0, "left", arch.device)
            prefix = KINDS[kind](arch, batch)
            suffix = continue_from(prefix, [row[cut:] for row, cut in zip(ROWS, CUTS, strict=True)], 0)
            found = run_blocks(arch, suffix, cache=prefix.fresh()).logits
        except Exception:  # whatever a model's own code raises: its cache is of another kind
            return "tokens"
    for row, (ids, cut) in enumerate(zip(ROWS, CUTS, strict=True)):
        if not agree(found[row, : len(ids) - cut], whole[row, cut : len(ids)], exact):
            return "tokens"
    return kind


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
