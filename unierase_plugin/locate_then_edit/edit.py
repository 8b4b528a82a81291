"""The edit as data. It is computed block by block from keys and values. Other modules apply and revert it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import EditError, PluginError, shown
from ..hparams import UniEraseHyperParams
from ..models.architecture import Architecture, stores_input_first
from ..models.weights import OriginalWeights, restored
from .keys import KeyStream
from .positions import Prompt
from .solve import LowRank, Solver, protected_directions
from .solvers import SOLVERS, MakeSolver, System
from .values import Values


@dataclass(frozen=True)
class WeightEdit:
    """Low-rank updates by layer, with the residuals that remain.

    residual_norms holds the mean of |z - h| over requests: before each edited block, and after the last.
    """

    updates: Mapping[int, LowRank]
    residual_norms: tuple[float, ...] = ()
    #: |Delta| / |W| by layer, Frobenius.
    norm_ratios: Mapping[int, float] = field(default_factory=dict)
    #: Keys by layer. Later edits protect them.
    keys: Mapping[int, Float[Tensor, "m n"]] = field(default_factory=dict)
    #: How many first columns of a layer come from a removal. They belong to all requests together and have no keys.
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
    """The solver that the hyper-parameters name, for one block.

    corpus, retain: second moments; earlier: keys of earlier edits, which the new edit shall leave alone;
    directions: gives the directions that a moment protects, for a threshold; kept: keys of facts to keep, each with the
    weight `retain_key_weight`; solvers: functions that make a solver, by name.
    """
    solver = solvers[hparams.solver](System(corpus, retain, hparams, directions))
    for keys, weight in ((earlier, 1.0), (kept, hparams.retain_key_weight)):
        if keys is not None and weight:
            solver = solver.protecting(math.sqrt(weight) * keys)
            if not callable(getattr(solver, "solve", None)):
                raise PluginError(
                    f"`protecting` of the solver {hparams.solver!r} gave {shown(solver)}. It must give a solver. Ask "
                    "its authors to mend it."
                )
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
    """Spreads Z - H over the edited blocks in order. Recomputes keys and residual after each (MEMIT, algorithm 1).

    Each block's keys depend on the blocks below. So the model is edited on the way, and restored before returning.
    """
    layers = tuple(solvers)
    stream = KeyStream(arch=arch, prompts=prompts, layers=layers, max_tokens=max_tokens, pad_id=pad_id)
    wanted = values.states.T
    updates: dict[int, LowRank] = {}
    norms, ratios, kept = [], {}, {}
    with restored(arch.projections[layer].weight for layer in layers):
        for index, layer in enumerate(layers):
            keys, states = stream.advance(layer)
            norms.append(float((wanted - states).norm(dim=0).mean()))
            update = solved(solvers[layer], keys, (wanted - states) / (len(layers) - index))
            ratios[layer] = update.norm() / float(arch.projections[layer].weight.detach().float().norm())
            _add(arch, layer, update)
            # The same layout as after reading a file: a product of another layout rounds differently.
            up, down = update.up.float().contiguous(), update.down.float().contiguous()
            updates[layer], kept[layer] = LowRank(up, down), keys.contiguous()
            progress((index + 1) / len(layers))
        norms.append(float((wanted - stream.final_states()).norm(dim=0).mean()))
    return WeightEdit(updates, tuple(norms), ratios, kept)


def solved(solver: Solver, keys: Float[Tensor, "m n"], residual: Float[Tensor, "d n"]) -> LowRank:
    """The solver's update. Raises PluginError if a plugin's solver gives no update of the right sizes."""
    found = solver.solve(keys, residual)
    if not isinstance(found, LowRank):
        raise PluginError(f"A solver gave {shown(found)}. It must give a LowRank. Ask its authors to mend it.")
    sizes = (*found.up.shape, *found.down.shape)
    if sizes != (len(residual), found.up.shape[-1], found.up.shape[-1], len(keys)):
        raise PluginError(
            f"A solver gave factors of the shapes {tuple(found.up.shape)} and {tuple(found.down.shape)}. They must be "
            f"({len(residual)}, n) and (n, {len(keys)}). Ask its authors to mend it."
        )
    return found


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
    """The expected |Delta| / |W| of an edit (root mean square over blocks), before its values are known.

    It assumes that each group's delta (None: a separate group) has the length `reach` x |h| and a direction unrelated
    to the others, and that every block moves its share of it. Then |Delta|^2 = sum over groups of
    |r|^2 |sum of the members' rows of (I + K^T B)^{-1} B^T|^2.
    """
    names = [group if group is not None else (index,) for index, group in enumerate(groups)]
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    member = torch.nn.functional.one_hot(torch.tensor([number[name] for name in names])).double()
    stream = KeyStream(arch=arch, prompts=prompts, layers=tuple(solvers), max_tokens=max_tokens, pad_id=pad_id)
    squares = []
    for layer, solver in solvers.items():
        keys, states = stream.advance(layer)
        rows = member.T @ solved(solver, keys, torch.eye(len(names))).down
        share = reach * (member.T @ states.norm(dim=0).double()) / member.sum(0) / len(solvers)
        weight = arch.projections[layer].weight.detach().float().norm()
        squares.append(float(((share[:, None] * rows).norm() / weight).square()))
    return math.sqrt(sum(squares) / len(squares))


def apply_edit(arch: Architecture, edit: WeightEdit) -> OriginalWeights:
    """Adds every update in place, or none if one fails. The returned copies restore the weights, to the bit."""
    # On the CPU, since they may be kept as long as the edited model.
    originals = OriginalWeights((arch.projections[layer].weight for layer in edit.layers), device="cpu")
    try:
        add_updates(arch, edit)
    except BaseException:
        originals.restore()
        raise
    return originals


def add_updates(arch: Architecture, edit: WeightEdit) -> None:
    """Adds every update in place. After an error, the caller restores the weights from its own copies."""
    for layer, update in edit.updates.items():
        _add(arch, layer, update)


@torch.no_grad()
def _add(arch: Architecture, layer: int, update: LowRank) -> None:
    projection = arch.projections[layer]
    weight = projection.weight
    # float32 factors on every path, so an edit that was read from a file gives the same bytes.
    delta = update.up.float() @ update.down.float()
    if not torch.isfinite(delta).all():
        raise EditError(f"The update of block {layer} holds NaN or infinity. Nothing was changed.")
    delta = delta.T if stores_input_first(projection) else delta
    changed = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    if not torch.isfinite(changed).all():
        raise EditError(
            f"The edited weight of block {layer} is too large for {str(weight.dtype).removeprefix('torch.')}. Nothing "
            "was changed. Load the model in bfloat16 or float32."
        )
    weight.copy_(changed)
