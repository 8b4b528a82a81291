"""How a block's output answers to a vector that is added to the output of its MLP's output projection.

Most blocks add the projection's output as it is. Others put a norm or a multiplier after it, or another map. Nothing
here knows which: the block is asked, by passes through it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from .architecture import Architecture
from .trace import TokenBatch, pad, run_blocks, token_batches

#: The sequence by which a block is asked whether it adds its projection's output as it is. Its last token counts.
PROBE = (1, 2)
#: In units of the weights' rounding: up to this relative error, a vector arrives unchanged.
UNCHANGED = 8.0
#: The least such error that counts: float32 sums are not exact to the last bit.
UNCHANGED_LEAST = 1e-4


@dataclass(frozen=True)
class Linearised:
    """A response f near one vector v (B, d), row by row."""

    #: f(v).
    output: Float32[Tensor, "B d"]
    #: w -> J w, where J is the derivative of f at v.
    forward: Callable[[Tensor], Tensor]
    #: u -> J^T u.
    backward: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Response:
    """f: (B, d) -> (B, d), from vectors added to a block's projection at one token of each row, to its output there."""

    arch: Architecture
    layer: int
    batch: TokenBatch
    #: The input (B, T, d) of the block; None for block 0, which starts from the token ids.
    hidden: Tensor | None
    #: Index of the token.
    column: int
    #: Makes a cache of earlier positions for one pass.
    cache: Callable[[], Any] = lambda: None

    def __call__(self, added: Float[Tensor, "B d"]) -> Float32[Tensor, "B d"]:
        """The outputs. Gradients flow to `added`, and through no other part of the block."""
        trace = run_blocks(
            self.arch,
            self.batch,
            first=self.layer,
            hidden=self.hidden,
            last=self.layer,
            cache=self.cache(),
            edit_projection=(self.layer, partial(add_at, added, self.column)),
        )
        output: Tensor = trace.hidden[:, self.column]
        return output.float().to(added.device)

    def zeros(self) -> Float32[Tensor, "B d"]:
        """Nothing to add."""
        return torch.zeros(len(self.batch.ids), self.arch.hidden_size, device=self.arch.device)

    def linearised(self, added: Float32[Tensor, "B d"]) -> Linearised:
        """f near `added`. Its derivatives cost no further pass through the block."""
        with torch.enable_grad():
            at = added.detach().requires_grad_(True)
            output = self(at)
            # J w is the derivative of J^T u by u, in the direction w.
            aside = torch.zeros_like(output, requires_grad=True)
            (turned,) = torch.autograd.grad(output, at, aside, create_graph=True)
        return Linearised(
            output=output.detach(),
            forward=lambda w: torch.autograd.grad(turned, aside, w, retain_graph=True)[0],
            backward=lambda u: torch.autograd.grad(output, at, u, retain_graph=True)[0],
        )

    def select(self, rows: Tensor) -> Response:
        """Only some rows, for a response without a cache."""
        hidden = None if self.hidden is None else self.hidden[rows.to(self.hidden.device)]
        return replace(self, batch=self.batch.select(rows.to(self.batch.ids.device)), hidden=hidden)


def add_at(added: Float[Tensor, "B d"], column: int, output: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
    """A projection's output, with `added` at one token of each row."""
    moved = output.clone()
    here = output[:, column]
    moved[:, column] = (here.float() + added.to(here.device)).to(here.dtype)
    return moved


@torch.no_grad()
def changes_on_the_way(arch: Architecture, layers: Sequence[int]) -> frozenset[int]:
    """The layers whose blocks do not add their projection's output as it is. One short pass, and one by each block."""
    batch = TokenBatch(
        torch.tensor([PROBE], device=arch.device),
        torch.ones((1, len(PROBE)), dtype=torch.long, device=arch.device),
        torch.arange(len(PROBE), device=arch.device)[None],
    )
    below = [layer - 1 for layer in layers if layer]
    outputs = run_blocks(arch, batch, last=max(layers), outputs_of=below).outputs
    return frozenset(
        layer
        for layer in layers
        if not _arrives(Response(arch, layer, batch, outputs[layer - 1] if layer else None, len(PROBE) - 1))
    )


def _arrives(response: Response) -> bool:
    nothing = response.zeros()
    before = response(nothing)
    # As large as the output itself, so that rounding of the sum counts little.
    added = before.square().mean().sqrt() * signs(nothing)
    error = (response(added) - before - added).norm() / added.norm()
    rounding = torch.finfo(response.arch.projections[response.layer].weight.dtype).eps
    # NaN, in a damaged model, is no sign of a norm. Other checks report it.
    return not bool(error > max(UNCHANGED * rounding, UNCHANGED_LEAST))


def signs(like: Float32[Tensor, "B d"]) -> Float32[Tensor, "B d"]:
    """1 and -1 in turn, in each row."""
    found = torch.ones_like(like)
    found[:, 1::2] = -1
    return found


def responses_at(
    arch: Architecture, layer: int, sequences: Sequence[Sequence[int]], max_tokens: int, pad_id: int
) -> Iterator[tuple[Tensor, Response]]:
    """The responses of a block at the last token of each sequence, in parts, each with the numbers of its sequences."""
    for rows in token_batches(sequences, max_tokens, alike=not arch.pads_left):
        batch = pad([sequences[row] for row in rows], pad_id, "left", arch.device)
        with torch.no_grad():
            below = run_blocks(arch, batch, last=layer - 1).hidden if layer else None
        yield torch.tensor(rows), Response(arch, layer, batch, below, -1)
