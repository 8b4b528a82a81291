"""Second moments C = E[k k^T] of the keys of ordinary text. One pass serves all layers and ends at the last."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64, Int, Shaped
from torch import Tensor, nn

from ..errors import EditError
from ..models.architecture import Architecture
from ..models.experts import Experts, Routing
from ..models.products import fast_linear_maps, fast_products
from ..models.trace import halves, pad, run_blocks, token_batches

#: k k^T is symmetric. Of this many column panels only the parts from the diagonal on are computed: 58 % of the work.
PANELS = 6
#: On a CPU, a longer batch of keys does not fit into the cache, and a shorter one costs more additions than it saves.
CPU_TOKENS = 1024
#: Saving takes at most this share of the time.
SAVING_SHARE = 0.05


@dataclass(frozen=True)
class SecondMoment:
    """Uncentred second moments by layer, over `count` tokens."""

    #: (m, m); for a block of experts (E, I, I), that of each expert's part of the key, also over all tokens.
    moments: dict[int, Float[Tensor, "*experts m m"]]
    count: int


def join_moments(first: SecondMoment, second: SecondMoment) -> SecondMoment:
    """The moments of two corpora taken together."""
    count = first.count + second.count
    moments = {
        layer: (first.count * moment + second.count * second.moments[layer]) / count
        for layer, moment in first.moments.items()
    }
    return SecondMoment(moments, count)


@dataclass
class MomentSums:
    """The state of a pass: sums of k k^T by layer, valid only on and above the diagonal.

    `batches` and `tokens` are those already processed; `count` are the tokens that the sums include.
    """

    sums: dict[int, Float64[Tensor, "*experts m m"]]
    count: int = 0
    batches: int = 0
    tokens: int = 0


def second_moments(
    arch: Architecture,
    sequences: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    max_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
    pad_id: int = 0,
    skip_first: int = 0,
    counted: Sequence[Sequence[int]] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> SecondMoment:
    """C of `layers` over all tokens of `sequences`, without the first `skip_first` tokens of each.

    counted     the positions to count instead, as a list for each sequence

    The products of a batch, and the result, have the dtype `dtype`; sums over batches are float64. ROME, MEMIT and
    EasyEdit make one pass for each layer; here one pass serves all. Sequences of similar length share a batch.
    """
    sums = begin_sums(arch, layers)
    add_sequences(
        arch,
        sequences,
        sums,
        max_tokens=max_tokens,
        dtype=dtype,
        pad_id=pad_id,
        skip_first=skip_first,
        counted=counted,
        progress=progress,
    )
    return mean_moments(sums, dtype, skip_first)


def begin_sums(arch: Architecture, layers: Sequence[int]) -> MomentSums:
    """Zeros. Each sum is on the device of its layer's projection if that has room for all of them, else on the CPU."""
    needed: dict[torch.device, int] = {}
    for layer in layers:
        device = arch.projections[layer].weight.device
        needed[device] = needed.get(device, 0) + 8 * math.prod(arch.moment_shape(layer))
    homes = {device: _home(device, size) for device, size in needed.items()}
    return MomentSums(
        {
            layer: torch.zeros(
                arch.moment_shape(layer), dtype=torch.float64, device=homes[arch.projections[layer].weight.device]
            )
            for layer in layers
        }
    )


def _home(device: torch.device, needed: int) -> torch.device:
    """A CUDA device that keeps half its free memory for the pass. Others may lack float64 or share their memory."""
    fits = device.type == "cuda" and needed < torch.cuda.mem_get_info(device)[0] // 2
    return device if fits else torch.device("cpu")


@fast_linear_maps()
@torch.no_grad()
def add_sequences(
    arch: Architecture,
    sequences: Sequence[Sequence[int]],
    sums: MomentSums,
    *,
    max_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
    pad_id: int = 0,
    skip_first: int = 0,
    counted: Sequence[Sequence[int]] | None = None,
    share: tuple[int, int] = (0, 1),
    keep: Callable[[MomentSums], None] | None = None,
    keep_every: float = 60.0,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Continues the pass of `sums` to its end. The result is bit for bit that of one undisturbed pass.

    counted     the positions to count, as a list for each sequence; None for all but the first `skip_first`
    share       (index, processes): this process takes every `processes`-th batch, from batch `index` on
    keep        called between batches about every `keep_every` seconds, less often if it takes long

    Raises EditError for sequences without a token.
    """
    places = [range(skip_first, len(sequence)) for sequence in sequences] if counted is None else counted
    kept = [(sequence, at) for sequence, at in zip(sequences, places, strict=True) if len(sequence)]
    if not kept:
        raise EditError("The corpus for the second moment holds no tokens.")
    sequences, places = [sequence for sequence, _ in kept], [at for _, at in kept]
    if arch.device.type == "cpu":
        max_tokens = min(max_tokens, CPU_TOKENS)
    batches = list(token_batches(sequences, max_tokens))[share[0] :: share[1]]
    total = sum(len(sequences[row]) for rows in batches for row in rows)
    due = time.monotonic() + keep_every
    for rows in batches[sums.batches :]:
        _add_batch(arch, [sequences[row] for row in rows], [places[row] for row in rows], sums, dtype, pad_id)
        sums.count += sum(len(places[row]) for row in rows)
        sums.tokens += sum(len(sequences[row]) for row in rows)
        sums.batches += 1
        progress(sums.tokens / total)
        if keep is not None and time.monotonic() >= due:
            start = time.monotonic()
            keep(sums)
            due = time.monotonic() + max(keep_every, (time.monotonic() - start) / SAVING_SHARE)


class _Done(Exception):  # noqa: N818 (no error: it ends a pass)
    """Ends a forward pass at the input of the last projection, which does not need to run."""


def _add_batch(
    arch: Architecture,
    sequences: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    sums: MomentSums,
    dtype: torch.dtype,
    pad_id: int,
) -> None:
    """Adds the products of one batch at `places`; if memory runs out, in halves."""
    waiting = [(list(range(len(sequences))), tuple(sums.sums))]
    while waiting:
        rows, layers = waiting.pop(0)
        batch = pad([sequences[row] for row in rows], pad_id, "right", arch.device)
        counted = _mask([places[row] for row in rows], batch.mask)
        added: set[int] = set()
        try:
            with _adding(arch, {layer: sums.sums[layer] for layer in layers}, counted, dtype, added):
                run_blocks(arch, batch)
        except torch.OutOfMemoryError:
            left = tuple(layer for layer in layers if layer not in added)
            waiting[:0] = [(half, left) for half in halves(rows)]


def _mask(places: Sequence[Sequence[int]], like: Shaped[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True at each row's places; on the device of `like`."""
    mask = torch.zeros(like.shape, dtype=torch.bool)
    for row, at in enumerate(places):
        mask[row, list(at)] = True
    return mask.to(like.device)


@contextmanager
def _adding(
    arch: Architecture, sums: dict[int, Tensor], counted: Tensor, dtype: torch.dtype, added: set[int]
) -> Iterator[None]:
    """Inside, a pass adds the keys at the positions `counted` (B, T), and ends after those of the last layer.

    Keys are added where they arise, so only those of one block are in memory. The layer then joins `added`.
    """
    # Usually all of them. Then nothing needs to be copied.
    rows = None if bool(counted.all()) else counted.flatten().nonzero().squeeze(1)
    last = max(sums)

    def add(layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        keys = rearrange(args[0], "... m -> (...) m")
        _add_products(sums[layer], (keys if rows is None else keys[rows.to(keys.device)]).to(dtype))
        added.add(layer)
        if layer == last:
            raise _Done

    def add_routed(layer: int, experts: Experts, routing: Routing) -> None:
        whole = routing if rows is None else routing.select(rows)
        _, numbers, parts = experts.parts(whole)
        _add_products_of_experts(sums[layer], numbers, parts.to(dtype))
        added.add(layer)
        if layer == last:
            raise _Done

    handles = [
        projection.watch(partial(add_routed, layer, projection))
        if isinstance(projection := arch.projections[layer], Experts)
        else projection.register_forward_pre_hook(partial(add, layer))
        for layer in sums
    ]
    try:
        yield
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()


@fast_products()
def _add_products(total: Float64[Tensor, "m m"], keys: Float[Tensor, "T m"]) -> None:
    """Adds keys^T keys on and above the diagonal. Entries below it have no meaning.

    Adds nothing if the memory does not hold the products.
    """
    width = -(-total.shape[0] // PANELS)
    starts = range(0, total.shape[0], width)
    products = [(keys[:, start : start + width].T @ keys[:, start:]).to(total.device) for start in starts]
    for start, product in zip(starts, products, strict=True):
        total[start : start + width, start:] += product


@fast_products()
def _add_products_of_experts(
    total: Float64[Tensor, "E I I"], numbers: Int[Tensor, " R"], parts: Float[Tensor, "R I"]
) -> None:
    """Adds the products of each expert's parts of keys: the largest first, so that it adds nothing if memory is out."""
    there = numbers.unique().tolist()
    for number in sorted(there, key=lambda each: -int((numbers == each).sum())):
        part = parts[numbers == number]
        total[number] += (part.T @ part).to(total.device)


def mean_moments(sums: MomentSums, dtype: torch.dtype, skip_first: int = 0) -> SecondMoment:
    """The sums divided by their count, as full matrices on the CPU, in `dtype`.

    Raises EditError for NaN, infinity, keys that are all zero, and no token.
    """
    if not sums.count:
        raise EditError(f"The corpus holds no text longer than the {skip_first} tokens that are left out.")
    moments = {}
    for layer, found_sum in sums.sums.items():
        total = _with_one_more_token(found_sum, sums.count) if found_sum.ndim == 3 else found_sum
        upper = (total.triu() / sums.count).to("cpu", dtype)
        if not torch.isfinite(upper).all():
            raise EditError(
                f"The second moment of block {layer} holds NaN or infinity: the model overflows on this corpus. "
                "Load it in float32 or bfloat16."
            )
        moments[layer] = upper + upper.triu(1).mT
    found = SecondMoment(moments, sums.count)
    why = unusable(found)
    if why:
        raise EditError(f"{why}: there is nothing in the model's MLP to edit there. Check the model's weights.")
    return found


def _with_one_more_token(total: Float64[Tensor, "E I I"], count: int) -> Float64[Tensor, "E I I"]:
    """The sums as if one more token had reached each expert, with a key of mean length and no direction.

    A corpus of N tokens that never reach an expert only shows that about one in N may. So such an expert is cheap to
    change, but not free; and the sums of an expert that few tokens reach are not singular. Where many tokens do, this
    changes next to nothing.
    """
    squared_length = total.diagonal(dim1=1, dim2=2).sum() / count
    identity = torch.eye(total.shape[1], dtype=total.dtype, device=total.device)
    return total + squared_length / total.shape[1] * identity


def unusable(found: SecondMoment) -> str:
    """Why the moments are not usable for an edit, judged by their diagonals; empty if they are."""
    for layer, moment in found.moments.items():
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        # Written so that NaN is refused as well.
        if not (bool((diagonal >= 0).all()) and 0 < float(diagonal.double().sum()) < float("inf")):
            return f"The second moment of block {layer} is zero, negative or NaN on its diagonal"
    return ""
