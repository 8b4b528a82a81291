"""Values Z: for each fact, the hidden state that makes the model answer with the unlearning token (MEMIT, section 4.3).

All requests are optimised together: blocks up to the edited one run once, keys and values of the positions before the
fact are cached, only the rest of each sequence runs, and logits are computed only where the loss looks. The vectors
delta alone get gradients, and requests that have reached their goal leave the batch.

Requests about one subject have nearly the same key, and no linear map takes nearly equal keys to different values. So
they share one delta, whose objective is the mean of theirs, as MEMIT's is over contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import EditError
from ..hparams import UniEraseHyperParams
from .positions import Prompt
from .prefix import PrefixCache, cache_prefixes, continue_from, select_suffixes
from .products import fast_linear_maps
from .trace import TokenBatch, halves, run_blocks


@dataclass(frozen=True)
class ValueTarget:
    """One column of the edit: a request in one prompt form.

    prompts       the bare prompt first, then the same after each context
    kl_prompt     "{subject} is a", whose continuation is to stay; None where there is no subject
    continuation  token ids that are to follow the unlearning token
    group         targets of the same group share one delta; None stands alone
    opening       what the answer is to begin with instead of the unlearning token; None for that token
    unwanted      token ids of the answer that is to become unlikely where the opening cannot be said; () for none
    instead       token ids that are to be said then; () for none
    """

    prompts: tuple[Prompt, ...]
    kl_prompt: Prompt | None
    continuation: tuple[int, ...]
    group: Hashable = None
    opening: int | None = None
    unwanted: tuple[int, ...] = ()
    instead: tuple[int, ...] = ()

    @property
    def cost(self) -> tuple[int, int]:
        """Rows, and tokens of the longest one, that every step runs."""
        longest = max(len(prompt.ids) - prompt.position for prompt in self.prompts)
        rows = len(self.prompts) * (1 + bool(self.unwanted) + bool(self.instead)) + (self.kl_prompt is not None)
        return rows, longest + max(len(self.continuation), len(self.unwanted), len(self.instead))


@dataclass(frozen=True)
class Values:
    """z of every target, with how well each was reached."""

    #: (n, d) float32: the hidden state wanted after the last edited block.
    states: Tensor
    #: (n,) probability of the unlearning token at the prompts' ends (geometric mean over contexts), with z in place.
    probability: Tensor
    #: (n,) negative log-likelihood of the token and, weighted, of all else that is aimed at, with z in place; nats.
    nll: Tensor
    #: (n,) |delta| / |h|.
    relative_norm: Tensor
    #: (n,) steps taken.
    steps: Tensor


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
    """z_i = h_i + delta_g(i) for every target. Raises EditError naming the requests whose value became NaN.

    A batch holds whole groups within `max_tokens`. Where the memory does not hold it, it is worked through in halves.
    """
    parts: list[tuple[list[int], Values]] = []
    finished = 0
    for rows in _batches(targets, max_tokens):

        def report(part: float, done: int = finished, size: int = len(rows)) -> None:
            progress((done + part * size) / len(targets))

        batch = _Batch.of(arch, [targets[row] for row in rows], token_id, hparams, max_tokens, pad_id)
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


def _batches(targets: Sequence[ValueTarget], max_tokens: int) -> list[list[int]]:
    """Targets in batches: whole groups, those with the longest suffixes first, so that like lengths share a batch."""
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
    """Groups that are optimised together, as one problem, or as several whose gradients are summed."""

    arch: Architecture
    hparams: UniEraseHyperParams
    #: Problems, each with the numbers of its targets within the batch.
    problems: list[tuple[Tensor, _Problem]]
    #: (n,) group of each target.
    group: Tensor
    #: (n, d) float32: h of each target's bare prompt.
    start: Tensor

    @classmethod
    def of(
        cls, arch: Architecture, targets: Sequence[ValueTarget], token_id: int, hparams: UniEraseHyperParams,
        max_tokens: int, pad_id: int,
    ) -> _Batch:  # fmt: skip
        layer = hparams.layers[-1]
        # More than one problem only where one group alone exceeds the budget.
        tokens = sum(target.cost[0] for target in targets) * max(target.cost[1] for target in targets)
        size = -(-len(targets) // -(-tokens // max_tokens))
        waiting = [list(range(at, min(at + size, len(targets)))) for at in range(0, len(targets), size)]
        problems: list[tuple[Tensor, _Problem]] = []
        while waiting:
            rows = waiting.pop(0)
            try:
                problem = _Problem.of(arch, [targets[row] for row in rows], token_id, layer, pad_id)
                problems.append((torch.tensor(rows, device=problem.start.device), problem))
            except torch.OutOfMemoryError:
                waiting = [*halves(rows), *waiting]
        names = [target.group if target.group is not None else (index,) for index, target in enumerate(targets)]
        number = {name: index for index, name in enumerate(dict.fromkeys(names))}
        start = torch.cat([problem.start for _, problem in problems])
        group = torch.tensor([number[name] for name in names], device=start.device)
        return cls(arch, hparams, problems, group, start)

    def optimise(self, progress: Callable[[float], None]) -> Values:
        h, start, group = self.hparams, self.start, self.group
        sizes = torch.bincount(group)
        scale = start.new_zeros(len(sizes)).index_add_(0, group, start.norm(dim=1)) / sizes
        unit = (scale / start.shape[1] ** 0.5)[:, None]
        delta = start.new_zeros(len(sizes), start.shape[1])
        nll, token_nll = start.new_full((2, len(group)), torch.nan)
        steps = torch.zeros(len(sizes), dtype=torch.long, device=start.device)
        adam = _Adam.zeros(delta)
        for step in range(h.v_num_grad_steps + 1):
            with torch.set_grad_enabled(step < h.v_num_grad_steps):
                gradient = self._gradient(delta, scale, 1 / sizes[group], nll, token_nll)
            worst = torch.full_like(scale, -torch.inf).scatter_reduce_(0, group, nll, "amax")
            going = ~(worst < h.v_stop_loss)  # NaN goes on, and is reported at the end
            if step == h.v_num_grad_steps or not bool(going.any()):
                break
            moved = delta - h.v_lr * unit * adam.direction(gradient * unit)
            limit = h.clamp_norm_factor * scale / moved.norm(dim=1).clamp(min=1e-12)
            delta = torch.where(going[:, None], moved * limit.clamp(max=1)[:, None], delta)
            steps += going
            self._leave(going)
            progress((step + 1) / h.v_num_grad_steps)
        progress(1.0)
        states = start + delta[group]
        norm = delta.norm(dim=1)[group] / start.norm(dim=1)
        return Values(states.cpu(), (-token_nll).exp().cpu(), nll.cpu(), norm.cpu(), steps[group].cpu())

    def _gradient(self, delta: Tensor, scale: Tensor, share: Tensor, nll: Tensor, token_nll: Tensor) -> Tensor:
        """d loss / d delta, (groups, d), where gradients are on; writes the likelihoods of targets still there."""
        total = torch.zeros_like(delta)
        waiting, done = self.problems, []
        while waiting:
            (rows, problem), *waiting = waiting
            try:
                current = delta.detach().requires_grad_(True)
                loss, goal, token = problem.loss(
                    self.arch, current[self.group[rows]], scale[self.group[rows]], self.hparams
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

    def _leave(self, going: Tensor) -> None:
        """Takes the targets of groups that have reached their goal out of the problems."""
        if bool(going.all()):
            return
        staying = [(rows, problem, going[self.group[rows]]) for rows, problem in self.problems]
        self.problems = [
            (rows, problem) if bool(stay.all()) else (rows[stay], problem.keep(stay))
            for rows, problem, stay in staying
            if bool(stay.any())
        ]


@dataclass
class _Adam:
    """Adam's step direction, row by row; each row sees the same steps as if it were alone.

    Gradients are in nats per root mean square of the state. Those under EPSILON are the rounding of float32 losses,
    which must not be blown up to full steps.
    """

    EPSILON: ClassVar[float] = 1e-6

    first: Tensor
    second: Tensor
    step: int = 0

    @classmethod
    def zeros(cls, like: Tensor) -> _Adam:
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def direction(self, gradient: Tensor, beta1: float = 0.9, beta2: float = 0.999) -> Tensor:
        self.step += 1
        self.first.lerp_(gradient, 1 - beta1)
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (self.second / (1 - beta2**self.step)).sqrt()
        return (self.first / (1 - beta1**self.step)) / (root + self.EPSILON)


#: Row, column, the token wanted there, and its weight.
_Point = tuple[int, int, int, float]


@dataclass(frozen=True)
class _Looks:
    """Positions at which the loss looks: (N,) row and column, the token wanted there, and its weight."""

    rows: Tensor
    columns: Tensor
    wanted: Tensor
    weight: Tensor

    def keep(self, rows: Tensor) -> _Looks:
        """Only looks into the rows kept (a mask over rows), renumbered."""
        stay, number = rows[self.rows], rows.long().cumsum(0) - 1
        return _Looks(number[self.rows[stay]], self.columns[stay], self.wanted[stay], self.weight[stay])


@dataclass(frozen=True)
class _Problem:
    """All rows of one optimisation: sequences cut at the fact, the state of each there, and where the loss looks."""

    prefix: PrefixCache
    suffix: TokenBatch
    #: (B, S, d): output of the last edited block for each suffix.
    hidden: Tensor
    #: (B,) target to which a row belongs.
    owner: Tensor
    #: (n, d) float32: h of each target's bare prompt.
    start: Tensor
    #: (n,) what the answers are to begin with.
    first: Tensor
    token: _Looks
    after: _Looks
    unwanted: _Looks
    instead: _Looks
    kl: _Looks
    #: (rows of `kl`, V) log-probabilities of the unedited model.
    kl_reference: Tensor
    layer: int

    @classmethod
    def of(cls, arch: Architecture, targets: Sequence[ValueTarget], token_id: int, layer: int, pad_id: int) -> _Problem:
        sequences: list[tuple[tuple[int, ...], int]] = []
        owner, bare, firsts = [], [], []
        token, after, kl = [], [], []
        unwanted: list[_Point] = []
        instead: list[_Point] = []
        for index, target in enumerate(targets):
            bare.append(len(sequences))
            first = token_id if target.opening is None else target.opening
            firsts.append(first)
            for prompt in target.prompts:
                row, at = len(sequences), len(prompt.ids) - prompt.position - 1
                follow = target.continuation
                sequences.append((prompt.ids + (first, *follow[:-1])[: len(follow)], prompt.position))
                token.append((row, at, first, 1 / len(target.prompts)))
                weight = 1 / (len(target.prompts) * max(1, len(follow)))
                after += [(row, at + 1 + step, wanted, weight) for step, wanted in enumerate(follow)]
                owner.append(index)
                for said, points in ((target.unwanted, unwanted), (target.instead, instead)):
                    weight = 1 / (len(target.prompts) * max(1, len(said)))
                    points += [(len(sequences), at + step, word, weight) for step, word in enumerate(said)]
                    sequences += [(prompt.ids + said[:-1], prompt.position)] if said else []
                    owner += [index] if said else []
            if target.kl_prompt is not None:
                prompt = target.kl_prompt
                kl.append((len(sequences), len(prompt.ids) - prompt.position - 1, 0, 1.0))
                sequences.append((prompt.ids, prompt.position))
                owner.append(index)
        prefix = cache_prefixes(arch, [ids[:at] for ids, at in sequences], pad_id)
        suffix = continue_from(prefix, [ids[at:] for ids, at in sequences], pad_id)
        with torch.no_grad():
            hidden: Tensor = run_blocks(arch, suffix, last=layer, cache=prefix.fresh()).hidden
        device = hidden.device
        problem = cls(
            prefix, suffix, hidden, torch.tensor(owner, device=device), hidden[bare, 0].float(),
            first=torch.tensor(firsts, device=device), token=_looks(token, device), after=_looks(after, device),
            unwanted=_looks(unwanted, device), instead=_looks(instead, device), kl=_looks(kl, device),
            kl_reference=hidden.new_zeros(0), layer=layer,
        )  # fmt: skip
        with torch.no_grad():
            logits = problem._logits(arch, hidden, [problem.kl]) if kl else hidden.new_zeros(0, 1)
        return replace(problem, kl_reference=logits.float().log_softmax(-1))

    def keep(self, targets: Tensor) -> _Problem:
        """The same for the targets kept (a mask over targets)."""
        rows = targets[self.owner]
        number = targets.long().cumsum(0) - 1
        prefix = self.prefix.select(rows)
        suffix = select_suffixes(prefix, self.suffix, rows)
        return replace(
            self, prefix=prefix, suffix=suffix, hidden=self.hidden[rows, : suffix.ids.shape[1]],
            owner=number[self.owner[rows]], start=self.start[targets], first=self.first[targets],
            token=self.token.keep(rows), after=self.after.keep(rows), unwanted=self.unwanted.keep(rows),
            instead=self.instead.keep(rows), kl=self.kl.keep(rows),
            kl_reference=self.kl_reference[rows[self.kl.rows]],
        )  # fmt: skip

    def loss(
        self, arch: Architecture, delta: Tensor, scale: Tensor, hparams: UniEraseHyperParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, likelihood part, token's negative log-likelihood), each (n,), for delta (n, d)."""
        moved = self.hidden.clone()
        moved[:, 0] = (self.hidden[:, 0].float() + delta[self.owner]).to(moved.dtype)
        weight = hparams.v_continuation_weight
        masked = [(self.unwanted, _telling, hparams.v_unlikely_weight), (self.instead, _surprise_without, weight)]
        masked = [each for each in masked if len(each[0].rows)]
        looks = [self.token, *([self.after] if weight else []), *(look for look, _, _ in masked), self.kl]
        logits = self._logits(arch, moved, looks).float()
        parts = iter(logits.split([len(look.rows) for look in looks]))
        nll = token_nll = self._per_target(self.token, _surprise(next(parts), self.token))
        if weight:
            nll = nll + weight * self._per_target(self.after, _surprise(next(parts), self.after))
        for look, losses, factor in masked:
            nll = nll + factor * self._per_target(look, losses(next(parts), look, self.first[self.owner[look.rows]]))
        rest = next(parts).log_softmax(-1)
        kl = (self.kl_reference.exp() * (self.kl_reference - rest)).sum(-1) if len(self.kl.rows) else rest.sum(-1)
        # The gradient of a norm at zero is undefined; the square root's argument is held off it.
        norm = (delta.square().sum(1) + 1e-12).sqrt()
        loss = nll + hparams.kl_factor * self._per_target(self.kl, kl) + hparams.v_weight_decay * norm / scale.square()
        return loss, nll.detach(), token_nll

    def _logits(self, arch: Architecture, hidden: Tensor, looks: Sequence[_Looks]) -> Tensor:
        where = torch.cat([look.rows for look in looks]), torch.cat([look.columns for look in looks])
        trace = run_blocks(
            arch, self.suffix, first=self.layer + 1, hidden=hidden, cache=self.prefix.fresh(), head_at=where
        )
        logits: Tensor = trace.logits
        return logits

    def _per_target(self, looks: _Looks, losses: Tensor) -> Tensor:
        total = torch.zeros(len(self.start), device=self.start.device)
        return total.index_add(0, self.owner[looks.rows], (losses * looks.weight.to(losses.device)).to(total.device))


def _looks(points: list[_Point], device: torch.device) -> _Looks:
    rows, columns, wanted = (
        torch.tensor([point[k] for point in points], dtype=torch.long, device=device) for k in range(3)
    )
    weight = torch.tensor([point[3] for point in points], dtype=torch.float32, device=device)
    return _Looks(rows, columns, wanted, weight)


def _surprise(logits: Tensor, looks: _Looks) -> Tensor:
    """Negative log-likelihood (N,) of the tokens wanted, without the logarithms of all the others."""
    return torch.nn.functional.cross_entropy(logits, looks.wanted.to(logits.device), reduction="none")


def _telling(logits: Tensor, looks: _Looks, masked: Tensor) -> Tensor:
    """-log(1 - p) (N,) of the tokens not wanted, p being what it is where the token `masked` (N,) cannot be said.

    As softplus of p's log-odds: neither the loss near p = 1 nor its gradient near p = 0 is lost to rounding, and no
    gradient of a logit exceeds 1 (unlikelihood: Welleck et al. 2020, arXiv 1908.04319).
    """
    wanted, masked = looks.wanted.to(logits.device)[:, None], masked.to(logits.device)[:, None]
    others = logits.scatter(1, torch.cat([wanted, masked], 1), -torch.inf)
    odds = logits.gather(1, wanted).masked_fill(wanted == masked, -torch.inf)[:, 0] - others.logsumexp(1)
    return torch.nn.functional.softplus(odds)


def _surprise_without(logits: Tensor, looks: _Looks, masked: Tensor) -> Tensor:
    """Negative log-likelihood (N,) of the tokens wanted where the token `masked` (N,) cannot be said."""
    return _surprise(logits.scatter(1, masked.to(logits.device)[:, None], -torch.inf), looks)
