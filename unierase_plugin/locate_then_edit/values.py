"""Values Z: for each fact, the hidden state that makes the model answer with the unlearning token (MEMIT, section 4.3).

All requests are optimised together. Blocks up to the edited one run once. Keys and values of the positions before the
fact are cached, only the rest of each sequence runs, and logits are computed only where the loss needs them. Only the
vectors delta get gradients. Requests that have reached their goal leave the batch.

Requests about one subject have nearly the same key, and no linear map takes nearly equal keys to different values. So
they share one delta. Its objective is the mean of their objectives, as MEMIT's is the mean over contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from ..errors import EditError
from ..hparams import UniEraseHyperParams
from ..models.architecture import Architecture
from ..models.products import fast_linear_maps
from ..models.response import Response, changes_on_the_way, responses_at
from ..models.trace import halves
from .reach import gains, outputs_with
from .value_loss import Objective, ValueTarget

#: The most tokens of a batch on a CPU. More are not faster, and need more memory for the backward pass.
CPU_TOKENS = 512
#: Adam's epsilon, in nats per root mean square of the state. Smaller gradients are rounding errors of float32 losses
#: and must not become full steps.
EPSILON = 1e-6
#: In the same unit: if no gradient is larger at the start, it may be that the answer does not depend on the state.
SILENT = 1e-5


@dataclass(frozen=True)
class Values:
    """z of every target, and how well each target was reached."""

    #: The wanted hidden state after the last edited block.
    states: Float32[Tensor, "n d"]
    #: Probability of the unlearning token at the prompts' ends with z in place (geometric mean over contexts).
    probability: Float[Tensor, " n"]
    #: Negative log-likelihood, with z in place, of the token and all other target words: weighted mean, nats.
    nll: Float[Tensor, " n"]
    #: |delta| / |h|.
    relative_norm: Float[Tensor, " n"]
    #: Steps taken.
    steps: Int[Tensor, " n"]


@fast_linear_maps()
def optimise_values(
    arch: Architecture,
    targets: Sequence[ValueTarget],
    token_id: int,
    hparams: UniEraseHyperParams,
    *,
    max_tokens: int,
    pad_id: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Values:
    """z_i = h_i + delta_g(i) for every target, or what the last edited block can make of it.

    If that block changes its projection's output on the way, delta is added to this output instead, divided by the
    block's gain. So z can be reached, and to first order delta is as long as the change of the block's output.

    Raises EditError that names the requests whose value became NaN, or whose answers do not depend on their value.
    A batch holds whole groups within `max_tokens`. If it does not fit in memory, it is processed in halves.
    """
    if arch.device.type == "cpu":
        max_tokens = min(max_tokens, CPU_TOKENS)
    parts: list[tuple[list[int], Values]] = []
    finished = 0
    in_front = bool(changes_on_the_way(arch, hparams.layers[-1:]))
    for rows in _batches(targets, max_tokens):

        def report(part: float, done: int = finished, size: int = len(rows)) -> None:
            progress((done + part * size) / len(targets))

        batch = _Batch.of(arch, [targets[row] for row in rows], token_id, hparams, max_tokens, pad_id, rows, in_front)
        parts.append((rows, batch.optimise(report)))
        finished += len(rows)
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    joined = {name: torch.cat([getattr(v, name) for _, v in parts])[order] for name in Values.__dataclass_fields__}
    bad = (~torch.isfinite(joined["states"]).all(1)).nonzero().flatten().tolist()
    if bad:
        raise EditError(
            f"The values of requests {bad} became NaN. Lower v_lr ({hparams.v_lr}) or load the model in float32."
        )
    return Values(**joined)


def _lever(gain: Float[Tensor, " n"], group: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """One by the mean gain of each target's group."""
    sizes = torch.bincount(group)
    mean = torch.zeros(len(sizes), device=gain.device).index_add_(0, group, gain) / sizes
    return 1 / mean.clamp(min=1e-12)[group]


def _batches(targets: Sequence[ValueTarget], max_tokens: int) -> list[list[int]]:
    """Targets in batches of whole groups. Groups are sorted by suffix length, so similar lengths share a batch."""
    groups: dict[Hashable, list[int]] = {}
    for index, target in enumerate(targets):
        groups.setdefault((0, target.group) if target.group is not None else (1, index), []).append(index)
    width = {key: max(targets[row].cost[1] for row in rows) for key, rows in groups.items()}
    batches: list[list[int]] = []
    room = 0
    for key in sorted(groups, key=lambda key: -width[key]):
        tokens = sum(targets[row].cost[0] for row in groups[key])
        if not batches or tokens > room:
            batches.append([])
            room = max_tokens // width[key]
        batches[-1] += groups[key]
        room -= tokens
    return batches


@dataclass
class _Batch:
    """Groups that are optimised together, as one problem or as several problems with summed gradients."""

    arch: Architecture
    hparams: UniEraseHyperParams
    #: The problems, each with the numbers of its targets in the batch.
    problems: list[tuple[Tensor, Objective]]
    #: (n,) group of each target.
    group: Tensor
    #: (n, d) float32: h of each target's bare prompt.
    start: Tensor
    #: (n,) number of each target among all, for messages.
    numbers: Sequence[int]
    #: (n,): what delta is multiplied by where it is added to the projection; None if it is added to the block's output.
    lever: Tensor | None
    #: Asks the block how it answers to a vector at its projection, for the bare prompts.
    ask: Callable[[], Iterator[tuple[Tensor, Response]]]

    @classmethod
    def of(
        cls,
        arch: Architecture,
        targets: Sequence[ValueTarget],
        token_id: int,
        hparams: UniEraseHyperParams,
        max_tokens: int,
        pad_id: int,
        numbers: Sequence[int],
        in_front: bool,
    ) -> _Batch:
        # There is more than one problem only if a single group exceeds the budget.
        tokens = sum(target.cost[0] for target in targets) * max(target.cost[1] for target in targets)
        size = -(-len(targets) // -(-tokens // max_tokens))
        waiting = [list(range(at, min(at + size, len(targets)))) for at in range(0, len(targets), size)]
        problems: list[tuple[Tensor, Objective]] = []
        while waiting:
            rows = waiting.pop(0)
            try:
                problem = Objective.of(arch, [targets[row] for row in rows], token_id, hparams, pad_id, in_front)
                problems.append((torch.tensor(rows, device=problem.start.device), problem))
            except torch.OutOfMemoryError:
                waiting = [*halves(rows), *waiting]
        names = [target.group if target.group is not None else (index,) for index, target in enumerate(targets)]
        number = {name: index for index, name in enumerate(dict.fromkeys(names))}
        start = torch.cat([problem.start for _, problem in problems])
        group = torch.tensor([number[name] for name in names], device=start.device)
        bare = [target.prompts[0].ids[: target.prompts[0].position + 1] for target in targets] if in_front else []
        ask = partial(responses_at, arch, hparams.layers[-1], bare, max_tokens, pad_id)
        lever = _lever(gains(ask(), len(targets)).to(group.device), group) if in_front else None
        return cls(
            arch=arch,
            hparams=hparams,
            problems=problems,
            group=group,
            start=start,
            numbers=numbers,
            lever=lever,
            ask=ask,
        )

    def optimise(self, progress: Callable[[float], None]) -> Values:
        h, start, group = self.hparams, self.start, self.group
        sizes = torch.bincount(group)
        scale = start.new_zeros(len(sizes)).index_add_(0, group, start.norm(dim=1)) / sizes
        # Each group's delta is in units of its states' root mean square. So a step means the same on every model.
        unit = (scale / start.shape[1] ** 0.5)[:, None]
        moved = start.new_zeros(len(sizes), start.shape[1])
        adam = torch.optim.Adam([moved], lr=h.v_lr, eps=EPSILON)
        longest = h.clamp_norm_factor * start.shape[1] ** 0.5
        nll, token_nll = start.new_full((2, len(group)), torch.nan)
        steps = torch.zeros(len(sizes), dtype=torch.long, device=start.device)
        for step in range(h.v_num_grad_steps + 1):
            with torch.set_grad_enabled(step < h.v_num_grad_steps):
                gradient = self._gradient(unit * moved, scale, 1 / sizes[group], nll, token_nll)
            worst = torch.full_like(scale, -torch.inf).scatter_reduce_(0, group, nll, "amax")
            going = ~(worst < h.v_stop_loss)  # NaN continues, and is reported at the end
            if step == 0 and h.v_num_grad_steps:
                self._check_reach(going & ((gradient * unit).abs().amax(1) < SILENT))
            if step == h.v_num_grad_steps or not bool(going.any()):
                break
            before, moved.grad = moved.clone(), gradient * unit
            adam.step()
            moved *= (longest / moved.norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None]
            moved.copy_(torch.where(going[:, None], moved, before))
            steps += going
            self._leave(going)
            progress((step + 1) / h.v_num_grad_steps)
        delta = unit * moved
        progress(1.0)
        if self.lever is None:
            states = start + delta[group]
            norm = delta.norm(dim=1)[group] / start.norm(dim=1)
        else:
            states = outputs_with(self.ask(), delta[group] * self.lever[:, None])
            norm = (states - start).norm(dim=1) / start.norm(dim=1)
        return Values(
            states=states.cpu(),
            probability=(-token_nll).exp().cpu(),
            nll=nll.cpu(),
            relative_norm=norm.cpu(),
            steps=steps[group].cpu(),
        )

    def _gradient(self, delta: Tensor, scale: Tensor, share: Tensor, nll: Tensor, token_nll: Tensor) -> Tensor:
        """d loss / d delta, (groups, d), if gradients are on. Writes the likelihoods of the remaining targets."""
        total = torch.zeros_like(delta)
        waiting, done = self.problems, []
        while waiting:
            (rows, problem), *waiting = waiting
            try:
                current = delta.detach().requires_grad_(True)
                loss, goal, token = problem.loss(
                    self.arch,
                    current[self.group[rows]],
                    scale[self.group[rows]],
                    self.hparams,
                    None if self.lever is None else self.lever[rows],
                )
                if torch.is_grad_enabled():
                    total += torch.autograd.grad((loss * share[rows]).sum(), current)[0]
            except torch.OutOfMemoryError:
                mask = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
                mask[halves(range(len(rows)))[0]] = True
                waiting = [(rows[mask], problem.keep(mask)), (rows[~mask], problem.keep(~mask)), *waiting]
                continue
            nll[rows], token_nll[rows] = goal, token.detach()
            done.append((rows, problem))
        self.problems = done
        return total

    def _check_reach(self, doubtful: Tensor) -> None:
        """Raises EditError for the groups among these whose delta does not move their answers at all."""
        silent = doubtful.clone()
        for rows, problem in self.problems:
            at = self.group[rows]
            if not bool(silent[at].any()):
                continue
            delta = torch.zeros(len(silent), self.start.shape[1], device=self.start.device, requires_grad=True)
            goal = problem.goals(self.arch, delta[at]).sum()
            silent &= ~torch.autograd.grad(goal, delta)[0].any(1)
        if bool(silent.any()):
            mute = [self.numbers[row] for row in silent[self.group].nonzero().flatten().tolist()]
            layer = self.hparams.layers[-1]
            raise EditError(
                f"The answers to requests {mute} do not depend on the state after block {layer} at their fact: no "
                "attention of a later block looks back that far. Edit lower blocks (layers), so that a block with full "
                "attention follows, or set fact_token to 'last'."
            )

    def _leave(self, going: Tensor) -> None:
        """Removes the targets of groups that have reached their goal from the problems."""
        if bool(going.all()):
            return
        staying = [(rows, problem, going[self.group[rows]]) for rows, problem in self.problems]
        self.problems = [
            (rows, problem) if bool(stay.all()) else (rows[stay], problem.keep(stay))
            for rows, problem, stay in staying
            if bool(stay.any())
        ]
