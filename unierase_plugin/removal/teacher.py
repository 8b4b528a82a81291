"""The teacher: the model without the directions that are strong in forgotten answers and weak in what is kept.

It is made in closed form. It gives its distribution at every token of the forgotten answers once; then the original
weights are put back, to the bit. It is too blunt to be used as the result, since it changes other behaviour too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Float32, Float64
from torch import Tensor, nn

from ..errors import EditError
from ..models.architecture import Architecture, Weighted, stores_input_first
from ..models.products import fast_linear_maps
from ..models.trace import pad, run_batches, run_blocks
from ..models.weights import restored
from .moments import answer_positions

#: The first strength of the filter, how many strengths are tried, and on how many facts.
FIRST_STRENGTH, STRENGTHS, CALIBRATED = 6.0, 5, 20
#: The search for a strength ends when |log(probability / wanted probability)| is below this.
NEAR_ENOUGH = 0.2


@dataclass(frozen=True)
class Teacher:
    """Target distributions: log-probabilities (T, V) in float16 on the CPU at T positions of every sequence."""

    sequences: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    log_probs: tuple[Tensor, ...]
    #: Weight of each position within its sequence, (T,), sum 1; () if all positions of a sequence weigh the same.
    weights: tuple[tuple[float, ...], ...] = ()


def filtered(
    weight: Float[Tensor, "d m"],
    forgotten: Float[Tensor, "m m"],
    kept: Float[Tensor, "m m"],
    strength: float,
    jitter: float = 1e-6,
) -> Float64[Tensor, "d m"]:
    """W' = W (I - F A^{-1}), A = strength R + F + epsilon I, for the moments F (forgotten) and R (kept).

    epsilon is `jitter` times the mean diagonal of strength R + F. W' minimises
    E_F |W' k|^2 + strength E_R |W' k - W k|^2 + epsilon |W' - W|^2: it maps keys of forgotten answers to zero, and keys
    of what is kept to the same outputs as before.
    """
    moment = strength * kept.double() + forgotten.double()
    moment.diagonal().add_(jitter * moment.diagonal().mean())
    factor = torch.linalg.cholesky(moment)
    gone = weight.double() @ forgotten.double()
    return weight.double() - torch.cholesky_solve(gone.T, factor).T


@contextmanager
def replaced(arch: Architecture, weights: Mapping[int, Float[Tensor, "d m"]]) -> Iterator[None]:
    """Inside the block, projections hold `weights` by layer. Afterwards they hold the old content, to the bit."""
    with restored(arch.projections[layer].weight for layer in weights):
        for layer, weight in weights.items():
            write_weight(arch, layer, weight)
        yield


@torch.no_grad()
def write_weight(arch: Architecture, layer: int, weight: Float[Tensor, "d m"]) -> None:
    """Writes the weight of a projection, in either layout."""
    projection = arch.dense(layer)
    projection.weight.copy_(weight.T if stores_input_first(projection) else weight)


def read_weight(arch: Architecture, layer: int) -> Float[Tensor, "d m"]:
    """The weight of a projection, in either layout, as a view."""
    return arch.matrix(layer)


def filtered_weights(
    arch: Architecture,
    layers: Sequence[int],
    forgotten: Mapping[int, Tensor],
    kept: Mapping[int, Tensor],
    strength: float,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[int, Tensor]:
    """`filtered` for every layer, in the dtype of its weight."""
    found: dict[int, Tensor] = {}
    for done, layer in enumerate(layers, start=1):
        weight = read_weight(arch, layer)
        home = solver_device(weight)
        new = filtered(weight.to(home), forgotten[layer].to(home), kept[layer].to(home), strength)
        found[layer] = new.to(weight)
        progress(done / len(layers))
    return found


def calibrated(
    arch: Architecture,
    layers: Sequence[int],
    forgotten: Mapping[int, Tensor],
    kept: Mapping[int, Tensor],
    sequences: Sequence[tuple[int, ...]],
    positions: Sequence[tuple[int, ...]],
    probability: float,
    *,
    max_tokens: int,
    pad_id: int,
    sample: int = CALIBRATED,
    near_enough: float = NEAR_ENOUGH,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[float, tuple[Tensor, ...]]:
    """The filter's strength, and the filtered model's log-probabilities at the positions, (T, V) each.

    Several strengths are tried. The result is the one at which the answers' mean probability (geometric within an
    answer) is nearest to `probability`, as a ratio. No single strength serves every forget set: one that removes enough
    of many facts removes too little of a few, since the moment of many facts is spread over more directions.

    sample: how many sequences a strength is tried on; near_enough: the logarithm of the ratio that ends the search.
    """
    tried: dict[float, float] = {}
    few = range(0, len(sequences), -(-len(sequences) // sample))

    def said(rows: Sequence[int], strength: float) -> tuple[Tensor, ...]:
        with replaced(arch, filtered_weights(arch, layers, forgotten, kept, strength)):
            return said_at(
                arch,
                [sequences[row] for row in rows],
                [positions[row] for row in rows],
                max_tokens=max_tokens,
                pad_id=pad_id,
            )

    strength = FIRST_STRENGTH
    for number in range(STRENGTHS):
        heard = said(few, strength)
        found = [mean_probability(each, sequences[row], positions[row]) for row, each in zip(few, heard, strict=True)]
        mean = sum(found) / len(found)
        if not math.isfinite(mean):
            raise EditError(
                f"The removal's teacher gives {mean} for the probability of the answers. Load the model in float32 or "
                "bfloat16."
            )
        tried[strength] = math.log(max(mean, 1e-9) / probability)
        progress((number + 1) / (STRENGTHS + 1))
        if abs(tried[strength]) < near_enough:
            break
        strength = _next_strength(tried)
    best = min(tried, key=lambda each: abs(tried[each]))
    return best, said(range(len(sequences)), best)


def mean_probability(log_probs: Float[Tensor, "T V"], sequence: Sequence[int], positions: Sequence[int]) -> float:
    """Geometric mean, over T positions, of the probability of the next token, from log-probabilities (T, V)."""
    wanted = torch.tensor([sequence[spot + 1] for spot in positions])
    return float(log_probs.float()[torch.arange(len(wanted)), wanted].mean().exp())


def _next_strength(tried: Mapping[float, float]) -> float:
    """The next strength to try: between the nearest ones on either side, else three times or a third of the last."""
    low = [each for each, distance in tried.items() if distance < 0]
    high = [each for each, distance in tried.items() if distance >= 0]
    if low and high:
        return math.sqrt(max(low) * min(high))
    return 3 * max(low) if low else min(high) / 3


def solver_device(weight: Tensor) -> torch.device:
    """Where systems of a projection's width are solved: on its own CUDA device, else on the CPU, which has float64."""
    return weight.device if weight.device.type == "cuda" else torch.device("cpu")


def ask(
    arch: Architecture,
    sequences: Sequence[tuple[int, ...]],
    starts: Sequence[int],
    *,
    max_tokens: int,
    pad_id: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Teacher:
    """The model's present log-probabilities at every token of the answers, which begin at `starts`."""
    positions = tuple(answer_positions(ids, start) for ids, start in zip(sequences, starts, strict=True))
    found = said_at(arch, sequences, positions, max_tokens=max_tokens, pad_id=pad_id, progress=progress)
    return Teacher(tuple(sequences), positions, found)


def said_at(
    arch: Architecture,
    sequences: Sequence[tuple[int, ...]],
    positions: Sequence[tuple[int, ...]],
    *,
    max_tokens: int,
    pad_id: int,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Float16[Tensor, "_ V"], ...]:
    """The model's present log-probabilities, on the CPU, at T positions of every sequence."""
    found: dict[int, Tensor] = {}

    @fast_linear_maps()
    @torch.no_grad()
    def run(rows: list[int]) -> None:
        logits = logits_at(arch, [sequences[row] for row in rows], [positions[row] for row in rows], pad_id)
        parts = logits.log_softmax(-1).to("cpu", torch.float16).split([len(positions[row]) for row in rows])
        # Copied: a view would keep the whole batch in memory.
        found.update((row, part.clone()) for row, part in zip(rows, parts, strict=True))
        progress(len(found) / len(sequences))

    run_batches(sequences, max_tokens, run)
    return tuple(found[row] for row in range(len(sequences)))


def logits_at(
    arch: Architecture, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], pad_id: int
) -> Float32[Tensor, "N V"]:
    """Logits at the positions of all sequences, one sequence after another. N counts all positions."""
    batch = pad(sequences, pad_id, "right", arch.device)
    rows = torch.tensor([row for row, found in enumerate(positions) for _ in found], device=arch.device)
    columns = torch.tensor([place for found in positions for place in found], device=arch.device)
    with _float32_head(arch):
        logits: Tensor = run_blocks(arch, batch, head_at=(rows, columns)).logits
    return logits.float()


@contextmanager
def _float32_head(arch: Architecture) -> Iterator[None]:
    """Inside the block, the head computes in float32. In half precision, rounding hides the differences of logits."""
    weight = arch.head.weight
    if weight.dtype == torch.float32:
        yield
        return

    def again(module: Weighted, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        return nn.functional.linear(args[0].float(), weight.float(), None if bias is None else bias.float())

    handle = arch.head.register_forward_hook(again)
    try:
        yield
    finally:
        handle.remove()
