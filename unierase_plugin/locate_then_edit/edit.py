"""The edit as data: computed block by block from keys and values, applied and reverted by others."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import EditError
from ..hparams import UniEraseHyperParams
from ..models.architecture import Architecture, stores_input_first
from ..models.weights import OriginalWeights, restored
from .keys import KeyStream
from .positions import Prompt
from .solve import LowRank, Solver, protected_directions
from .solvers import SOLVERS, MakeSolver, System
from .values import Values

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class WeightEdit:
    """Low-rank updates by layer, with what each left undone.

    residual_norms holds, for the state before each block and after the last, the mean of |z - h| over requests.
    """

    updates: Mapping[int, LowRank]
    residual_norms: tuple[float, ...] = ()
    #: |Delta| / |W| by layer, Frobenius.
    norm_ratios: Mapping[int, float] = field(default_factory=dict)
    #: Keys by layer, which later edits protect.
    keys: Mapping[int, Float[Tensor, "m n"]] = field(default_factory=dict)
    #: How many of a layer's columns, the first ones, are of a removal: of all requests together, with no key of any.
    removed: Mapping[int, int] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.updates)

    def rank(self, layer: int) -> int:
        return self.updates[layer].up.shape[1]


def make_solver(
    hparams: UniEraseHyperParams,
    corpus: Float[Tensor, "m m"],
    retain: Float[Tensor, "m m"] | None,
    earlier: Float[Tensor, "m p"] | None = None,
    directions: Callable[[Tensor, float], Tensor] = protected_directions,
    kept: Float[Tensor, "m q"] | None = None,
    solvers: Mapping[str, MakeSolver] = SOLVERS,
) -> Solver:
    """The closed form that the hyper-parameters name, for one block.

    corpus, retain: second moments; earlier: keys of edits made before, which the new one is to leave
    alone; directions: gives those that a moment protects, by a threshold; kept: keys of what is to be kept,
    each of which weighs `retain_key_weight` by itself; solvers: what makes one, by name.
    """
    solver = solvers[hparams.solver](System(corpus, retain, hparams, directions))
    for keys, weight in ((earlier, 1.0), (kept, hparams.retain_key_weight)):
        if keys is not None and weight:
            solver = solver.protecting(math.sqrt(weight) * keys)
    return solver


def compute_edit(
    arch: Architecture,
    prompts: Sequence[Sequence[Prompt]],
    values: Values,
    solvers: Mapping[int, Solver],
    *,
    max_tokens: int,
    pad_id: int,
    progress: Callable[[float], None] = lambda share: None,
) -> WeightEdit:
    """Spreads Z - H over the edited blocks in order, keys and residual recomputed after each (MEMIT, algorithm 1).

    The model is edited on the way, since each block's keys depend on the blocks below, and put back before returning.
    """
    layers = tuple(solvers)
    stream = KeyStream(arch, prompts, layers, max_tokens, pad_id)
    wanted = values.states.T
    updates: dict[int, LowRank] = {}
    norms, ratios, kept = [], {}, {}
    with restored(arch.projections[layer].weight for layer in layers):
        for index, layer in enumerate(layers):
            keys, states = stream.advance(layer)
            norms.append(float((wanted - states).norm(dim=0).mean()))
            update = solvers[layer].solve(keys, (wanted - states) / (len(layers) - index))
            ratios[layer] = update.norm() / float(arch.projections[layer].weight.detach().float().norm())
            _add(arch, layer, update)
            # In one layout, whether they come from here or from a file: a product of another layout rounds differently.
            up, down = update.up.float().contiguous(), update.down.float().contiguous()
            updates[layer], kept[layer] = LowRank(up, down), keys.contiguous()
            progress((index + 1) / len(layers))
        norms.append(float((wanted - stream.final_states()).norm(dim=0).mean()))
    return WeightEdit(updates, tuple(norms), ratios, kept)


@torch.no_grad()
def expected_norm_ratio(
    arch: Architecture,
    prompts: Sequence[Sequence[Prompt]],
    groups: Sequence[Hashable],
    solvers: Mapping[int, Solver],
    reach: float,
    *,
    max_tokens: int,
    pad_id: int,
) -> float:
    """|Delta| / |W|, root mean square over blocks, that an edit is likely to have, before its values are known.

    As if each group's delta (None: a group of its own) were `reach` x |h| long, its direction unrelated to the others',
    and every block moved its share of it: then |Delta|^2 = sum over groups of |r|^2 |sum of the members' rows of
    (I + K^T B)^{-1} B^T|^2.
    """
    names = [group if group is not None else (index,) for index, group in enumerate(groups)]
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    member = torch.nn.functional.one_hot(torch.tensor([number[name] for name in names])).double()
    stream = KeyStream(arch, prompts, tuple(solvers), max_tokens, pad_id)
    squares = []
    for layer, solver in solvers.items():
        keys, states = stream.advance(layer)
        rows = member.T @ solver.solve(keys, torch.eye(len(names))).down
        share = reach * (member.T @ states.norm(dim=0).double()) / member.sum(0) / len(solvers)
        weight = arch.projections[layer].weight.detach().float().norm()
        squares.append(float(((share[:, None] * rows).norm() / weight).square()))
    return math.sqrt(sum(squares) / len(squares))


def apply_edit(arch: Architecture, edit: WeightEdit) -> OriginalWeights:
    """Adds every update in place, or none if one fails. What it returns takes the edit back, to the bit."""
    # On the CPU: they may be kept for as long as the edited model is.
    originals = OriginalWeights((arch.projections[layer].weight for layer in edit.layers), device="cpu")
    try:
        for layer, update in edit.updates.items():
            _add(arch, layer, update)
    except BaseException:
        originals.restore()
        raise
    return originals


@torch.no_grad()
def _add(arch: Architecture, layer: int, update: LowRank) -> None:
    projection = arch.projections[layer]
    weight = projection.weight
    # float32 factors on every path, so that an edit read back from a file gives the same bytes.
    delta = update.up.float() @ update.down.float()
    if not torch.isfinite(delta).all():
        raise EditError(f"The update of block {layer} holds NaN or infinity; nothing was changed.")
    delta = delta.T if stores_input_first(projection) else delta
    changed = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    if not torch.isfinite(changed).all():
        raise EditError(
            f"The edited weight of block {layer} is too large for {str(weight.dtype).removeprefix('torch.')}; nothing "
            "was changed. Load the model in bfloat16 or float32."
        )
    weight.copy_(changed)
