"""How much a projection's outputs matter to what is kept: second moments of the gradients at the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int
from torch import Tensor

from ..models.architecture import Architecture
from ..models.products import fast_linear_maps, fast_products
from ..models.trace import run_batches
from .distil import watched
from .teacher import logits_at


def output_moments(
    arch: Architecture,
    sequences: Sequence[tuple[int, ...]],
    positions: Sequence[tuple[int, ...]],
    layers: Sequence[int],
    *,
    seed: int,
    max_tokens: int,
    pad_id: int,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[int, Float32[Tensor, "d d"]]:
    """S = E[g g^T] by layer: g is the gradient of -log p(y) at the projection's output.

    y is drawn from the model's own distribution at every position. So S belongs to the Fisher information and not to
    the tokens that the texts happen to hold (Martens and Grosse 2015, section 2; Kunstner et al. 2019, arXiv
    1905.12558). The draws of a sequence depend on `seed` and its number, not on its batch.
    """
    total: dict[int, Tensor] = {}
    seen = 0

    @fast_linear_maps()
    @torch.enable_grad()
    def run(rows: list[int]) -> None:
        nonlocal seen
        with watched(arch, layers) as (_, outputs):
            logits = logits_at(arch, [sequences[row] for row in rows], [positions[row] for row in rows], pad_id)
        parts = logits.detach().split([len(positions[row]) for row in rows])
        drawn = torch.cat([_draw(part, seed, row) for row, part in zip(rows, parts, strict=True)]).to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        products = [_square(each) for each in torch.autograd.grad(loss, [outputs[layer] for layer in layers])]
        for layer, product in zip(layers, products, strict=True):
            total[layer] = total[layer].add_(product) if layer in total else product
        seen += len(rows)
        progress(seen / len(sequences))

    run_batches(sequences, max_tokens, run)
    count = sum(map(len, positions))
    return {layer: (each / count).cpu() for layer, each in total.items()}


def _draw(logits: Float[Tensor, "T V"], seed: int, row: int) -> Int[Tensor, " T"]:
    """One token for each row of logits."""
    generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + row)
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]


@fast_products()
def _square(gradient: Float[Tensor, "*batch d"]) -> Float32[Tensor, "d d"]:
    rows = rearrange(gradient, "... d -> (...) d").float()
    return rows.T @ rows
