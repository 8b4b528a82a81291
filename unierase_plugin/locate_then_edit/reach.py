"""Vectors for a projection's output that move its block's output as wanted.

The closed form of an edit says what is added to the projection's output. If the block adds this output as it is, the
wanted change of the block's output is the vector itself. Else the vector is found by Gauss-Newton steps on
|f(v) - wanted|^2, where f is the block's response (`models.response`). Each step is a least-squares problem, solved by
conjugate gradients. Its derivatives need no pass through the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float32
from torch import Tensor

from ..models.response import Linearised, Response, signs
from ..models.trace import halves

#: A vector is found if at most this share of the wanted change is left.
FOUND = 1e-3
#: The most evaluations of a response.
EVALUATIONS = 20
#: An evaluation that leaves more than this share of what was left before is the last one: the rest is out of reach.
STALLED = 0.95
#: The shortest part of a step that is tried.
SHORTEST = 1e-2
#: Steps of conjugate gradients. With the preconditioner, a norm needs about three.
CONJUGATE_STEPS = 12
#: Share of the typical gain below which a coordinate is damped. Moving it would take a vector out of proportion.
DAMPING = 0.02


def vectors_for(responses: Iterable[tuple[Tensor, Response]], change: Float32[Tensor, "d n"]) -> Float32[Tensor, "d n"]:
    """V, so that the block's output at request i moves by column i of `change` when column i of V is added.

    responses: the block's responses, each with the numbers of the requests that are its rows. They have no cache.
    """
    found = torch.zeros_like(change)
    for rows, vectors in _by_parts(
        responses, lambda response, rows: nearest(response, change[:, rows].T.to(response.arch.device))
    ):
        found[:, rows] = vectors.T.to(found)
    return found


def outputs_with(responses: Iterable[tuple[Tensor, Response]], added: Float32[Tensor, "n d"]) -> Float32[Tensor, "n d"]:
    """The block's output at each request, with a row of `added` at its projection."""
    found = torch.empty_like(added)
    with torch.no_grad():
        for rows, outputs in _by_parts(
            responses, lambda response, rows: response(added[rows.to(added.device)].to(response.arch.device))
        ):
            found[rows.to(found.device)] = outputs.to(found)
    return found


def gains(responses: Iterable[tuple[Tensor, Response]], count: int) -> Float32[Tensor, " n"]:
    """For each of `count` requests: how much longer a small vector gets on its way to the block's output.

    It is |J^T s| / |s| for a vector s of ones and minus ones in turn. For a multiplier it is the multiplier. For a norm
    it is about the root mean square over all directions.
    """
    found = torch.empty(count)
    for rows, gain in _by_parts(responses, lambda response, rows: _gain(response.linearised(response.zeros()))):
        found[rows] = gain.cpu()
    return found


def _gain(near: Linearised) -> Float32[Tensor, " B"]:
    both = signs(near.output)
    gain: Tensor = near.backward(both).norm(dim=1) / both.norm(dim=1)
    return gain


def _by_parts(
    responses: Iterable[tuple[Tensor, Response]], run: Callable[[Response, Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `run` gives for each response, with the numbers of its requests; in halves if memory runs out."""
    for whole in responses:
        waiting = [whole]
        while waiting:
            (rows, response), *waiting = waiting
            try:
                found = run(response, rows)
            except torch.OutOfMemoryError:
                parts = [torch.tensor(part) for part in halves(range(len(rows)))]
                waiting = [*((rows[part], response.select(part)) for part in parts), *waiting]
                continue
            yield rows, found


def nearest(response: Response, change: Float32[Tensor, "B d"]) -> Float32[Tensor, "B d"]:
    """v with f(v) as near to f(0) + change as v can take it, row by row.

    Of the vectors that lead there, v is about the shortest. Where f(0) or the change holds NaN, so does v.
    """
    best = response.zeros()
    near = response.linearised(best)
    wanted = near.output + change
    left, size = change, change.norm(dim=1)
    goal, length = FOUND * size, torch.ones_like(size)
    step, going = _step(near, left), size > 0
    for _ in range(EVALUATIONS):
        trial = best + torch.where(going, length, 0.0)[:, None] * step
        near = response.linearised(trial)
        missing = wanted - near.output
        after, before = missing.norm(dim=1), left.norm(dim=1)
        better = going & (after < before)
        best = torch.where(better[:, None], trial, best)
        left = torch.where(better[:, None], missing, left)
        # A step that led away is tried again at half its length.
        length = torch.where(better, 1.0, length / 2)
        going &= torch.where(better, (after > goal) & (after < STALLED * before), length > SHORTEST)
        if not bool(going.any()):
            break
        step = torch.where(better[:, None], _step(near, left), step)
    return torch.where(torch.isfinite(wanted).all(1, keepdim=True), best, torch.nan)


def _step(near: Linearised, left: Float32[Tensor, "B d"]) -> Float32[Tensor, "B d"]:
    """w that minimises |J w - left|^2 + mu |w|^2, row by row."""
    # The squared lengths of J's columns: exact if every coordinate of the output depends on its own input alone.
    columns = near.backward(signs(left)).square()
    damping = DAMPING**2 * columns.mean(dim=1, keepdim=True)
    scale = (columns + damping).clamp(min=torch.finfo(columns.dtype).tiny)
    found = torch.zeros_like(left)
    down = near.backward(left)
    way = down / scale
    size = (down * way).sum(1, keepdim=True)
    first = size
    for _ in range(CONJUGATE_STEPS):
        pushed = near.forward(way)
        bent = pushed.square().sum(1, keepdim=True) + (damping * way.square()).sum(1, keepdim=True)
        share = torch.where(bent > 0, size / bent, 0.0)
        found = found + share * way
        down = down - share * (near.backward(pushed) + damping * way)
        after = (down * down / scale).sum(1, keepdim=True)
        if not bool((after > 1e-8 * first).any()):
            break
        way = down / scale + torch.where(size > 0, after / size, 0.0) * way
        size = after
    return found
