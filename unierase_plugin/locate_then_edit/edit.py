"""The edit as data. It is computed block by block from keys and values. Other modules apply and revert it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import EditError, PluginError, shown
from ..hparams import UniEraseHyperParams
from ..models.architecture import Architecture, stores_input_first
from ..models.experts import Experts
from ..models.response import changes_on_the_way
from ..models.weights import OriginalWeights, restored
from .keys import KeyStream
from .positions import Prompt
from .reach import outputs_with, vectors_for
from .solve import LowRank, Solver, protected_directions
from .solvers import SOLVERS, MakeSolver, System
from .values import Values

#: The most sweeps over the edited blocks, if the last one has a norm after its projection.
SWEEPS = 8
#: Sweeps end once the last block misses at most this share of the first residual.
MISSED = 2e-3
#: Sweeps end if one leaves more than this share of what the one before left.
WORTH_A_SWEEP = 0.8
#: Added to the squares of the solver's mixture, which are 1 for a request that gets all it asks for.
SINGULAR = 1e-3


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
    corpus: Float[Tensor, "*experts i i"],
    retain: Float[Tensor, "*experts i i"] | None,
    earlier: Float[Tensor, "m p"] | None = None,
    directions: Callable[[Tensor, float], Tensor] = protected_directions,
    kept: Float[Tensor, "m q"] | None = None,
    solvers: Mapping[str, MakeSolver] = SOLVERS,
) -> Solver:
    """The solver that the hyper-parameters name, for one block.

    corpus, retain: second moments, of one matrix or of each expert (m = E I); earlier: keys of earlier edits, which the
    new edit shall leave alone;
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

    A block may change its projection's output on the way to its own output, by a norm or a multiplier. Then the
    projection gets the vectors that move the block's output as wanted (`projected`). The last block cannot make every
    output. What it could not do is asked of the blocks before it, in a further sweep over all of them. If its output
    also depends on the projection's output at earlier tokens, what this cost is asked of the block itself. A sweep
    begins with the weights as they were, so it adds nothing to the rank.
    """
    layers = tuple(solvers)
    stream = KeyStream(arch=arch, prompts=prompts, layers=layers, max_tokens=max_tokens, pad_id=pad_id)
    changing = changes_on_the_way(arch, layers)
    wanted = values.states.T
    most = SWEEPS if layers[-1] in changing else 1
    beyond, again = torch.zeros_like(wanted), torch.zeros_like(wanted)
    best, least = WeightEdit({}), math.inf
    for sweep in range(most):

        def report(part: float, done: int = sweep) -> None:
            progress((done + part) / most)

        edit, unmade, astray = _sweep(arch, stream, wanted, beyond, again, solvers, changing, report)
        size, before = float((unmade + astray).norm(dim=0).mean()), least
        if not size >= least:
            best, least = edit, size
        if least <= MISSED * edit.residual_norms[0] or size > WORTH_A_SWEEP * before:
            break
        beyond += unmade * len(layers) / max(1, len(layers) - 1)
        again += astray
        stream.rewind()
    progress(1.0)
    return best


def _sweep(
    arch: Architecture,
    stream: KeyStream,
    wanted: Float[Tensor, "d n"],
    beyond: Float[Tensor, "d n"],
    again: Float[Tensor, "d n"],
    solvers: Mapping[int, Solver],
    changing: Collection[int],
    progress: Callable[[float], None],
) -> tuple[WeightEdit, Float[Tensor, "d n"], Float[Tensor, "d n"]]:
    """One edit of all blocks, and what the last block's output misses of what its solver intended, in two parts.

    The first part is what no vector at the fact's token could make. The second is what was to be made and was not.

    beyond: what all blocks but the last move in addition; again: the second part, summed over earlier sweeps
    """
    layers = tuple(solvers)
    updates: dict[int, LowRank] = {}
    norms, ratios, kept = [], {}, {}
    unmade, astray = torch.zeros_like(wanted), torch.zeros_like(wanted)
    with restored(arch.projections[layer].weight for layer in layers):
        for index, layer in enumerate(layers):
            keys, states = stream.advance(layer)
            norms.append(float((wanted - states).norm(dim=0).mean()))
            residual = (wanted - states) / (len(layers) - index)
            if layer != layers[-1]:
                residual = residual + beyond / (len(layers) - index)
            if layer in changing:
                more = again if layer == layers[-1] else torch.zeros_like(again)
                residual, intended, made = projected(stream, solvers[layer], keys, residual, more)
                unmade, astray = states + intended + more - made, made - more
            update = solved(solvers[layer], keys, residual)
            ratios[layer] = update.norm() / float(arch.projections[layer].weight.detach().float().norm())
            _add(arch, layer, update)
            # The same layout as after reading a file: a product of another layout rounds differently.
            up, down = update.up.float().contiguous(), update.down.float().contiguous()
            updates[layer], kept[layer] = LowRank(up, down), keys.contiguous()
            progress((index + 1) / len(layers))
        final = stream.final_states()
        norms.append(float((wanted - final).norm(dim=0).mean()))
    astray = astray - final if layers[-1] in changing else torch.zeros_like(wanted)
    return WeightEdit(updates, tuple(norms), ratios, kept), unmade, astray


def projected(
    stream: KeyStream,
    solver: Solver,
    keys: Float[Tensor, "m n"],
    residual: Float[Tensor, "d n"],
    more: Float[Tensor, "d n"],
) -> tuple[Float[Tensor, "d n"], Float[Tensor, "d n"], Float[Tensor, "d n"]]:
    """V, to be solved for in the place of the residual; how far outputs shall move; and the outputs that V S makes.

    more: how much farther they are to go, since what is solved for does not all arrive

    The solver gives request i a mixture R S of what is asked for all requests: the other terms of its equations hold
    it back. If the block added the projection's output as it is, its output would move by R S. So V is such that V S
    moves it by R S. Only the block's own map is made up for, and the solver's trade-off stays as it is.
    """
    spread = solved(solver, keys, torch.eye(keys.shape[1]))
    mixed = (spread.up @ (spread.down @ stream.bare_keys.to(spread.down))).to(residual)
    intended = residual @ mixed
    whole = vectors_for(stream.responses(), residual + more)
    missing = vectors_for(stream.responses(), intended + more) - whole @ mixed
    # Requests with nearly equal keys cannot move apart, so S may be nearly singular.
    gram = mixed @ mixed.T + SINGULAR * torch.eye(len(mixed)).to(mixed)
    vectors = whole + torch.linalg.solve(gram, mixed @ missing.T).T
    return vectors, intended, outputs_with(stream.responses(), (vectors @ mixed).T).T


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
    |r|^2 |sum of the members' rows of (I + K^T B)^{-1} B^T|^2. In a block that changes its projection's output on the
    way, r becomes a vector for each member, for a direction drawn at random.
    """
    names = [group if group is not None else (index,) for index, group in enumerate(groups)]
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    member = torch.nn.functional.one_hot(torch.tensor([number[name] for name in names])).double()
    stream = KeyStream(arch=arch, prompts=prompts, layers=tuple(solvers), max_tokens=max_tokens, pad_id=pad_id)
    changing = changes_on_the_way(arch, tuple(solvers))
    squares = []
    for layer, solver in solvers.items():
        keys, states = stream.advance(layer)
        rows = solved(solver, keys, torch.eye(len(names))).down
        share = reach * (member.T @ states.norm(dim=0).double()) / member.sum(0) / len(solvers)
        weight = arch.projections[layer].weight.detach().float().norm()
        if layer in changing:
            ways = torch.randn(len(states), len(share), generator=torch.Generator().manual_seed(layer))
            vectors = vectors_for(stream.responses(), (share.float() * ways / ways.norm(dim=0)) @ member.T.float())
            parts = (group.nonzero().flatten() for group in member.T)
            size = math.hypot(*(LowRank(vectors[:, own].to(rows), rows[own]).norm() for own in parts))
            squares.append((size / float(weight)) ** 2)
        else:
            squares.append(float(((share[:, None] * (member.T @ rows)).norm() / weight).square()))
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
    if isinstance(projection, Experts):
        inner = projection.inner
        # The others stay as they are, to the bit.
        for expert in update.down.any(0).reshape(-1, inner).any(1).nonzero().squeeze(1).tolist():
            part = update.down[:, expert * inner : (expert + 1) * inner]
            _add_to(projection.of_expert(expert), LowRank(update.up, part), f"block {layer}, expert {expert}")
        return
    _add_to(projection.weight.T if stores_input_first(projection) else projection.weight, update, f"block {layer}")


def _add_to(weight: Float[Tensor, "d m"], update: LowRank, name: str) -> None:
    # float32 factors on every path, so an edit that was read from a file gives the same bytes.
    delta = update.up.float() @ update.down.float()
    if not torch.isfinite(delta).all():
        raise EditError(f"The update of {name} holds NaN or infinity. Nothing was changed.")
    changed = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    if not torch.isfinite(changed).all():
        raise EditError(
            f"The edited weight of {name} is too large for {str(weight.dtype).removeprefix('torch.')}. Nothing "
            "was changed. Load the model in bfloat16 or float32."
        )
    weight.copy_(changed)
