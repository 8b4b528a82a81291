"""Keys K of the facts to edit, and the hidden states H from which the residual is measured.

A fact's key at a block is the input of that block's MLP output projection at the fact's position. Attention is causal,
so the key does not depend on later tokens, and each prompt is cut after that position. The blocks below the first
edited block never change, so they run once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32
from torch import Tensor

from ..models.architecture import Architecture
from ..models.products import fast_linear_maps
from ..models.response import Response
from ..models.trace import TokenBatch, halves, pad, run_blocks, token_batches
from .positions import Prompt


@dataclass(frozen=True)
class _Chunk:
    """Prompts that run together: their numbers (B,), and the input (B, T, d) of the block at which a pass starts."""

    rows: Tensor
    batch: TokenBatch
    hidden: Tensor | None = None

    def select(self, part: Sequence[int]) -> _Chunk:
        chosen = torch.tensor(part)
        here = chosen.to(self.batch.ids.device)
        hidden = None if self.hidden is None else self.hidden[chosen.to(self.hidden.device)]
        return _Chunk(self.rows[chosen], self.batch.select(here), hidden)


class KeyStream:
    """Goes through the edited blocks upwards and gives keys with the present weights, so after edits of lower blocks.

    prompts[i] are the contexts of request i, the bare prompt first. K is the mean over them (MEMIT, equation 19). H is
    the state of the bare prompt.
    """

    def __init__(
        self,
        arch: Architecture,
        prompts: Sequence[Sequence[Prompt]],
        layers: Sequence[int],
        max_tokens: int,
        pad_id: int,
    ) -> None:
        self.arch, self.layers = arch, tuple(layers)
        self._owner = torch.tensor([i for i, contexts in enumerate(prompts) for _ in contexts])
        self._bare = torch.tensor([j == 0 for contexts in prompts for j in range(len(contexts))])
        self._count = len(prompts)
        flat = [prompt.ids[: prompt.position + 1] for contexts in prompts for prompt in contexts]
        self._chunks = [
            _Chunk(torch.tensor(rows), pad([flat[row] for row in rows], pad_id, "left", arch.device))
            for rows in token_batches(flat, max_tokens, alike=not arch.pads_left)
        ]
        #: The block at which the next pass starts.
        self._at = 0
        #: Where the pass for the first edited block ended: what is below never changes.
        self._bottom: tuple[list[_Chunk], int] | None = None
        #: (m, n): keys of the bare prompts, at the block where the last pass ended.
        self.bare_keys = torch.zeros(0, 0)

    @fast_linear_maps()
    @torch.no_grad()
    def advance(self, layer: int) -> tuple[Float32[Tensor, "m n"], Float32[Tensor, "d n"]]:
        """K of `layer` and H of the last edited block, both float32, with the present weights."""
        below = layer - 1
        keys: list[Tensor] = []
        states: list[Tensor] = []
        done: list[_Chunk] = []
        waiting = self._chunks
        while waiting:
            chunk, *waiting = waiting
            try:
                trace = run_blocks(
                    self.arch,
                    chunk.batch,
                    first=self._at,
                    hidden=chunk.hidden,
                    last=self.layers[-1],
                    inputs_of=[layer],
                    outputs_of=[below] if below >= self._at else [],
                )
            except torch.OutOfMemoryError:
                waiting = [*(chunk.select(part) for part in halves(range(len(chunk.rows)))), *waiting]
                continue
            done.append(replace(chunk, hidden=trace.outputs[below]) if below >= self._at else chunk)
            keys.append(trace.projection_inputs[layer][:, -1].float().cpu())
            states.append(trace.hidden[:, -1].float().cpu())
        self._chunks, self._at = done, layer
        if self._bottom is None:
            self._bottom = done, layer
        rows = torch.cat([chunk.rows for chunk in done])
        self.bare_keys = self._bare_only(rows, torch.cat(keys)).T
        return self._mean(rows, torch.cat(keys)).T, self._bare_only(rows, torch.cat(states)).T

    @torch.no_grad()
    def final_states(self) -> Float32[Tensor, "d n"]:
        """H (d, n) after the last edit, for the remaining residual."""
        return self.advance(self.layers[-1])[1]

    def rewind(self) -> None:
        """Goes back to the first edited block, to go through all of them again."""
        if self._bottom is not None:
            self._chunks, self._at = self._bottom

    def responses(self) -> Iterator[tuple[Tensor, Response]]:
        """How the block of the last pass answers at the bare prompts: parts, each with the numbers of its requests."""
        for chunk in self._chunks:
            bare = self._bare[chunk.rows].nonzero().flatten()
            if len(bare):
                own = chunk.select(bare.tolist())
                yield self._owner[own.rows], Response(self.arch, self._at, own.batch, own.hidden, -1)

    def _mean(self, rows: Tensor, values: Tensor) -> Tensor:
        sums = torch.zeros(self._count, values.shape[1]).index_add_(0, self._owner[rows], values)
        return sums / torch.bincount(self._owner, minlength=self._count)[:, None]

    def _bare_only(self, rows: Tensor, values: Tensor) -> Tensor:
        bare = self._bare[rows]
        out = torch.empty(self._count, values.shape[1])
        out[self._owner[rows][bare]] = values[bare]
        return out
