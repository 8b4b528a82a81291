"""A pass of second-order distillation: one forward, one backward, two ridge solves for each block, a line search.

Let g be the gradient of the loss at a projection's output and k its input. Then G = sum_p g_p k_p^T over all positions
p is the gradient of the loss by the projection's weight. K-FAC (Martens and Grosse 2015, arXiv 1503.05671) takes the
step -S^{-1} G R^{-1}; R is the second moment of k, S that of g. Here R and S are those of what is kept. So among all
steps that lower the loss equally to first order, this step changes the output on kept text least, to second order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor, nn

from ..errors import EditError
from ..locate_then_edit.value_loss import Divergence
from ..models.architecture import Architecture
from ..models.products import fast_linear_maps, fast_products
from ..models.trace import run_batches
from .moments import answer_positions
from .teacher import Teacher, logits_at, solver_device, write_weight

#: Longest and shortest step that are tried, as shares of the step that would bring a linear loss to zero.
MOST, LEAST = 8.0, 0.125
#: Every third sequence of each kind is used to choose a step.
SEARCHED = 3
#: A pass reads at least this many sequences to keep. If there are at least twice as many, the passes share them.
READ = 24


@dataclass(frozen=True)
class Lesson:
    """One sequence with the target distributions at T of its positions, and each position's weight in the loss."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    #: (T, V) float16; None if the targets are the sequence's own next tokens.
    log_probs: Tensor | None
    #: (T,)
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Pass:
    """Figures of a pass: the loss before it, the step as a share of the linear one (0 if none helped), and eta."""

    loss: float
    fraction: float
    rate: float
    #: Negative log-likelihood of the replacement answers after the pass, in nats, if the pass learned them.
    declined: float | None = None


def lessons(teacher: Teacher, weight: float = 1.0) -> list[Lesson]:
    """A teacher's sequences. Their losses sum to `weight` x the mean over sequences of the mean over positions.

    If the teacher has weights, the mean over positions uses them.
    """
    share = weight / max(1, len(teacher.sequences))
    weights = teacher.weights or ((),) * len(teacher.sequences)
    parts = zip(teacher.sequences, teacher.positions, teacher.log_probs, weights, strict=True)
    return [
        Lesson(ids, at, said, tuple(share * each for each in own or (1 / len(at),) * len(at)))
        for ids, at, said, own in parts
    ]


def openings(sequences: Sequence[tuple[int, ...]], starts: Sequence[int], weight: float) -> list[Lesson]:
    """Lessons on the sequences' own tokens from `starts` on, as a mean over sequences.

    The first token weighs `weight`, and the rest together weigh `weight` too. In a run with half of that for the rest,
    the model repeated a learned token instead of the sentence that follows it.
    """
    share = weight / max(1, len(sequences))
    found = []
    for ids, start in zip(sequences, starts, strict=True):
        positions = answer_positions(ids, start)
        rest = 1 / max(1, len(positions) - 1)
        found.append(Lesson(ids, positions, None, (share, *(share * rest,) * (len(positions) - 1))))
    return found


def searched(kinds: Sequence[Sequence[Lesson]]) -> list[Lesson]:
    """Every third lesson of each kind, with more weight to stand for the others.

    A kind with a single lesson is used too, so that no kind is left out when a step is chosen.
    """
    found: list[Lesson] = []
    for kind in kinds:
        some = kind[::SEARCHED]
        found += [_raised(each, len(kind) / len(some)) for each in some]
    return found


def read_in_pass(kind: Sequence[Lesson], number: int) -> list[Lesson]:
    """The part of a kind that pass `number` (from 0) reads, with more weight to stand for the others.

    As many passes as there are parts read all of them. Fewer than twice READ lessons are one part.
    """
    parts = max(1, len(kind) // READ)
    some = kind[number % parts :: parts]
    return [_raised(each, len(kind) / len(some)) for each in some]


def divergence(arch: Architecture, taught: Sequence[Lesson], *, max_tokens: int, pad_id: int) -> float:
    """The loss: the sum over lessons and their positions of weight x KL(target || present model)."""
    losses: list[float] = []

    @fast_linear_maps()
    @torch.no_grad()
    def run(rows: list[int]) -> None:
        losses.append(float(_loss(arch, [taught[row] for row in rows], pad_id)))

    run_batches([each.ids for each in taught], max_tokens, run)
    return sum(losses)


def gradients(
    arch: Architecture,
    taught: Sequence[Lesson],
    layers: Sequence[int],
    *,
    max_tokens: int,
    pad_id: int,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[float, dict[int, Float32[Tensor, "d m"]]]:
    """The loss, and its gradient G for every layer's projection, computed without gradients of parameters."""
    total: dict[int, Tensor] = {}
    losses: list[float] = []
    seen = 0

    @fast_linear_maps()
    @torch.enable_grad()
    def run(rows: list[int]) -> None:
        nonlocal seen
        with watched(arch, layers) as (inputs, outputs):
            loss = _loss(arch, [taught[row] for row in rows], pad_id)
        found = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
        # All products of a batch come before any sum: if memory runs out on the way, no sum has changed.
        products = [_product(g, inputs[layer]) for layer, g in zip(layers, found, strict=True)]
        for layer, product in zip(layers, products, strict=True):
            total[layer] = total[layer].add_(product) if layer in total else product
        losses.append(float(loss.detach()))
        seen += len(rows)
        progress(seen / len(taught))

    run_batches([each.ids for each in taught], max_tokens, run)
    return sum(losses), total


def factorised(metric: Float[Tensor, "m m"], ridge: float) -> Float32[Tensor, "m m"]:
    """Lower Cholesky factor of R + ridge x mean(diag R) I. Raises EditError if R is not finite."""
    moment = metric.to(torch.float64, copy=True)
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(moment)
    if int(info) or not torch.isfinite(factor).all():
        raise EditError(
            f"The second moment of what is kept is not positive definite with removal_ridge = {ridge}. Raise it, or "
            "load the model in float32 or bfloat16."
        )
    return factor.float()


def direction(
    gradient: Float[Tensor, "d m"], inputs: Float[Tensor, "m m"], outputs: Float[Tensor, "d d"]
) -> Float[Tensor, "d m"]:
    """D = S^{-1} G R^{-1}, from the Cholesky factors of R (inputs) and S (outputs).

    D maximises tr(D G^T) - tr(S D R D^T) / 2: its effect on the loss, minus its second-order effect on kept text.
    """
    home = solver_device(gradient)
    right: Tensor = torch.cholesky_solve(gradient.to(home, torch.float64).T, inputs.to(home, torch.float64))
    both: Tensor = torch.cholesky_solve(right.T, outputs.to(home, torch.float64))
    return both.contiguous().to(gradient)


def linear_rate(loss: float, gradient: Mapping[int, Tensor], directions: Mapping[int, Tensor]) -> float:
    """L / sum over layers of tr(D G^T): the step at which a linear loss would be zero; 0 if the sum is not positive."""
    slope = sum(float((directions[layer].double() * each.double()).sum()) for layer, each in gradient.items())
    _check_finite(slope)
    return loss / slope if slope > 0 else 0.0


def chosen_fraction(measure: Callable[[float], float]) -> float:
    """The step among MOST, ..., 2, 1, ..., LEAST: doubled while that helps, else halved until it helps; 0 if none does.

    measure gives the loss at a step; 0 gives the present loss.
    """
    before, fraction = measure(0.0), 1.0
    _check_finite(before)
    lowest = measure(fraction)
    if lowest < before:
        while fraction < MOST and (further := measure(2 * fraction)) < lowest:
            fraction, lowest = 2 * fraction, further
        return fraction
    while fraction > LEAST:
        fraction /= 2
        if measure(fraction) < before:
            return fraction
    return 0.0


def _check_finite(value: float) -> None:
    """Raises for NaN and infinity. Comparisons with NaN are false, so NaN would look like a step that does not help."""
    if not math.isfinite(value):
        raise EditError(
            f"A pass of the removal gives {value} for its loss or gradient. Load the model in float32 or bfloat16, "
            "or raise removal_ridge."
        )


def take_pass(
    arch: Architecture,
    taught: Sequence[Lesson],
    originals: Mapping[int, Tensor],
    change: Mapping[int, Tensor],
    factors: Mapping[int, tuple[Float[Tensor, "m m"], Float[Tensor, "d d"]]],
    looked: Sequence[Lesson],
    *,
    max_tokens: int,
    pad_id: int,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[dict[int, Tensor], Pass]:
    """One pass from the weights `originals` + `change`, both (d, m) by layer: the change after it, and its figures.

    factors: Cholesky factors of R and S by layer; looked: lessons that choose the step (`searched`).

    Afterwards the projections hold the weights after the pass, whatever they held before.
    """
    layers = tuple(originals)
    write_changed(arch, originals, change)
    loss, gradient = gradients(
        arch, taught, layers, max_tokens=max_tokens, pad_id=pad_id, progress=lambda share: progress(0.6 * share)
    )
    directions = {layer: direction(gradient[layer], *factors[layer]) for layer in layers}
    rate = linear_rate(loss, gradient, directions)

    def moved(fraction: float) -> dict[int, Tensor]:
        return {layer: change[layer] - fraction * rate * directions[layer] for layer in layers}

    def measure(fraction: float) -> float:
        write_changed(arch, originals, moved(fraction))
        return divergence(arch, looked, max_tokens=max_tokens, pad_id=pad_id)

    fraction = chosen_fraction(measure) if rate else 0.0
    after = moved(fraction) if fraction else dict(change)
    write_changed(arch, originals, after)
    progress(1.0)
    return after, Pass(loss, fraction, fraction * rate)


def write_changed(arch: Architecture, originals: Mapping[int, Tensor], change: Mapping[int, Tensor]) -> None:
    """Writes W + change, both (d, m) by layer, summed in float32."""
    for layer, original in originals.items():
        write_weight(arch, layer, (original.float() + change[layer]).to(original.dtype))


def _raised(lesson: Lesson, times: float) -> Lesson:
    return replace(lesson, weights=tuple(times * own for own in lesson.weights))


def _loss(arch: Architecture, taught: Sequence[Lesson], pad_id: int) -> Tensor:
    own = [each for each in taught if each.log_probs is None]
    told = [(each, each.log_probs) for each in taught if each.log_probs is not None]
    order = [*own, *(each for each, _ in told)]
    logits = logits_at(arch, [each.ids for each in order], [each.positions for each in order], pad_id)
    wanted = torch.tensor([each.ids[spot + 1] for each in own for spot in each.positions], dtype=torch.long)
    said = torch.cat([*(log_probs for _, log_probs in told), logits.new_zeros(0, logits.shape[1]).cpu()])
    weight = torch.cat([logits.new_tensor(each.weights) for each in order])
    kl: Tensor = Divergence.apply(logits, wanted, said.to(logits.device).float())
    return (kl * weight).sum()


@contextmanager
def watched(arch: Architecture, layers: Sequence[int]) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Records the projections' inputs (B, T, m) and outputs (B, T, d) of a pass inside the block.

    The outputs are in the pass's graph. The graph begins at the lowest projection: no gradient is computed below it.
    """
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def look(layer: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs[layer] = args[0].detach()
        outputs[layer] = output if output.requires_grad else output.detach().requires_grad_()
        return outputs[layer]

    handles = [arch.dense(layer).register_forward_hook(partial(look, layer)) for layer in layers]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


@fast_products()
def _product(gradient: Float[Tensor, "*batch d"], keys: Float[Tensor, "*batch m"]) -> Float32[Tensor, "d m"]:
    """sum_p g_p k_p^T."""
    rows = rearrange(gradient, "... d -> (...) d").float()
    return rows.T @ rearrange(keys, "... m -> (...) m").float()
