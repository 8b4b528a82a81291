"""The objective of a value: tokens that are wanted, tokens that are not, and distributions that shall stay the same.

Sequences are cut at the fact. The part before it is cached, and the rest runs at every step. Logits are computed only
where the loss needs them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from ..hparams import UniEraseHyperParams
from ..models.architecture import Architecture
from ..models.prefix import PrefixCache, cache_prefixes, continue_from, select_suffixes
from ..models.response import add_at
from ..models.trace import TokenBatch, run_blocks
from .positions import Prompt

#: In a pass with at most this many tokens, reading the weights takes longer than computing with them.
FEW_TOKENS = 256


@dataclass(frozen=True)
class ValueTarget:
    """One column of the edit: a request in one prompt form.

    prompts       the bare prompt first, then the same prompt after each context
    kl_prompt     "{subject} is a", whose continuation shall stay the same; None if there is no subject
    continuation  token ids that shall follow the unlearning token
    group         targets of the same group share one delta; None stands alone
    opening       token with which the answer shall begin; None for the unlearning token
    unwanted      token ids of the answer that shall become unlikely when the opening cannot be said; () for none
    instead       token ids that shall be said when the opening cannot be said; () for none
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
        """The number of rows that every step runs, and the tokens of the longest row."""
        longest = max(len(prompt.ids) - prompt.position for prompt in self.prompts)
        rows = len(self.prompts) * (1 + bool(self.unwanted) + bool(self.instead)) + (self.kl_prompt is not None)
        return rows, longest + max(len(self.continuation), len(self.unwanted), len(self.instead))


#: The kinds of looks. A look is a position that the loss reads. OPENS: the token that opens the answer. FOLLOWS: a
#: token after it. With the opening masked, UNWANTED: a token not to say, and INSTEAD: a token to say. STAYS: a
#: distribution that shall stay the same.
OPENS, FOLLOWS, UNWANTED, INSTEAD, STAYS = range(5)


class _Point(NamedTuple):
    """A look before it is a row of tensors."""

    row: int
    column: int
    #: The token whose probability counts; without meaning if the look STAYS.
    wanted: int
    #: Weight in the loss.
    weight: float
    kind: int
    #: The token that cannot be said, if the look is UNWANTED or INSTEAD.
    masked: int = 0


@dataclass(frozen=True)
class _Looks:
    """The looks as tensors, sorted by kind."""

    rows: Int[Tensor, " N"]
    columns: Int[Tensor, " N"]
    wanted: Int[Tensor, " N"]
    weight: Float[Tensor, " N"]
    kind: Int[Tensor, " N"]
    masked: Int[Tensor, " N"]

    @classmethod
    def of(cls, points: Sequence[_Point], device: torch.device) -> _Looks:
        columns = zip(*sorted(points, key=lambda point: point.kind), strict=True)
        return cls(*(torch.tensor(column, device=device) for column in columns))

    def keep(self, rows: Tensor) -> _Looks:
        """Only the looks into the rows kept (a mask over rows), renumbered."""
        stay, number = rows[self.rows], rows.long().cumsum(0) - 1
        kept = _Looks(*(getattr(self, spec.name)[stay] for spec in fields(self)))
        return replace(kept, rows=number[kept.rows])


@dataclass(frozen=True)
class _Rows:
    """Sequences cut at the fact. The part before it is cached; the rest runs at every step and holds the looks."""

    prefix: PrefixCache
    suffix: TokenBatch
    #: Output of the last edited block for each suffix.
    hidden: Float[Tensor, "B S d"]
    #: Input of this block, if vectors are added to its projection; None for block 0, which starts from the token ids.
    below: Float[Tensor, "B S d"] | None
    #: Whether vectors are added to the block's projection, instead of to its output.
    in_front: bool
    #: The target to which each row belongs.
    owner: Int[Tensor, " B"]
    looks: _Looks
    layer: int
    #: Log-probabilities of the unedited model at the looks that STAY; (0, 1) without one.
    reference: Float[Tensor, "R V"]

    @classmethod
    def of(
        cls,
        arch: Architecture,
        prompts: Sequence[tuple[tuple[int, ...], int]],
        owner: Sequence[int],
        points: Sequence[_Point],
        layer: int,
        pad_id: int,
        in_front: bool,
    ) -> _Rows:
        prefix = cache_prefixes(arch, [ids[:at] for ids, at in prompts], pad_id)
        suffix = continue_from(prefix, [ids[at:] for ids, at in prompts], pad_id)
        with torch.no_grad():
            outputs_of = [layer - 1] if in_front and layer else []
            trace = run_blocks(arch, suffix, last=layer, cache=prefix.fresh(), outputs_of=outputs_of)
        hidden: Tensor = trace.hidden
        device = hidden.device
        rows = cls(
            prefix=prefix,
            suffix=suffix,
            hidden=hidden,
            below=trace.outputs.get(layer - 1),
            in_front=in_front,
            owner=torch.tensor(owner, device=device),
            looks=_Looks.of(points, device),
            layer=layer,
            reference=hidden.new_zeros(0, 1),
        )
        if all(point.kind != STAYS for point in points):
            return rows
        with torch.no_grad():
            logits = rows.logits(arch, hidden.new_zeros(max(owner) + 1, hidden.shape[2], dtype=torch.float32))
        return replace(rows, reference=logits[(rows.looks.kind == STAYS).to(logits.device)].log_softmax(-1))

    def keep(self, rows: Tensor) -> _Rows:
        """Only some rows (a mask). Their targets keep their numbers."""
        prefix = self.prefix.select(rows)
        suffix = select_suffixes(prefix, self.suffix, rows)
        looks = self.looks
        staying = rows[looks.rows[looks.kind == STAYS]].to(self.reference.device)
        return replace(
            self,
            prefix=prefix,
            suffix=suffix,
            hidden=self.hidden[rows, : suffix.ids.shape[1]],
            below=None if self.below is None else self.below[rows, : suffix.ids.shape[1]],
            owner=self.owner[rows],
            looks=looks.keep(rows),
            reference=self.reference[staying],
        )

    def logits(self, arch: Architecture, delta: Float32[Tensor, "n d"]) -> Float32[Tensor, "N V"]:
        """Logits at the looks, after each target's delta was added at the fact."""
        if self.in_front:
            passed = run_blocks(
                arch,
                self.suffix,
                first=self.layer,
                hidden=self.below,
                cache=self.prefix.fresh(),
                edit_projection=(self.layer, partial(add_at, delta[self.owner], 0)),
                head_at=(self.looks.rows, self.looks.columns),
            )
            found: Tensor = passed.logits
            return found.float()
        moved = (self.hidden[:, 0].float() + delta[self.owner]).to(self.hidden.dtype)
        hidden = torch.cat([moved[:, None], self.hidden[:, 1:]], dim=1)
        trace = run_blocks(
            arch,
            self.suffix,
            first=self.layer + 1,
            hidden=hidden,
            cache=self.prefix.fresh(),
            head_at=(self.looks.rows, self.looks.columns),
        )
        logits: Tensor = trace.logits
        return logits.float()

    def losses(self, arch: Architecture, delta: Float32[Tensor, "n d"]) -> Float[Tensor, "kinds n"]:
        """The weighted sum of the losses at each target's looks of a kind."""
        looks = self.looks
        seen = self._seen(self.logits(arch, delta)).to(looks.weight.device)
        place = looks.kind * len(delta) + self.owner[looks.rows]
        summed: Tensor = seen.new_zeros((STAYS + 1) * len(delta)).index_add(0, place, seen * looks.weight)
        return rearrange(summed, "(kind target) -> kind target", kind=STAYS + 1)

    def _seen(self, logits: Tensor) -> Tensor:
        seen: Tensor = Divergence.apply(logits, self.looks.wanted, self.reference)
        return seen


class _MaskedRows(_Rows):
    """Rows in which the opening of the answer cannot be said."""

    def _seen(self, logits: Tensor) -> Tensor:
        looks = self.looks
        wanted, masked = looks.wanted.to(logits.device)[:, None], looks.masked.to(logits.device)[:, None]
        logits = logits.scatter(1, masked, -torch.inf)
        count = int((looks.kind == UNWANTED).sum())
        told, instead = logits.split([count, len(logits) - count])
        surprise = torch.nn.functional.cross_entropy(instead, wanted[count:, 0], reduction="none")
        return torch.cat([_telling(told, wanted[:count]), surprise])


@dataclass
class _Lines:
    """Sequences under construction, with their positions, the target to which each belongs, and their looks."""

    prompts: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    points: list[_Point] = field(default_factory=list)

    def add(
        self,
        owner: int,
        prompt: Prompt,
        words: tuple[int, ...],
        weights: tuple[float, ...],
        kinds: tuple[int, ...],
        masked: int = 0,
    ) -> None:
        """Adds a prompt with words after it, and a look for each word.

        The first weight and kind are those of the first word. The last weight and kind are those of the other words.
        """
        at = len(prompt.ids) - prompt.position - 1
        self.points += [
            _Point(
                row=len(self.prompts),
                column=at + step,
                wanted=word,
                weight=weights[0 if step == 0 else -1],
                kind=kinds[0 if step == 0 else -1],
                masked=masked,
            )
            for step, word in enumerate(words)
        ]
        self.prompts.append((prompt.ids + words[:-1], prompt.position))
        self.owner.append(owner)

    def joined(self, other: _Lines) -> _Lines:
        begin = len(self.prompts)
        moved = [point._replace(row=begin + point.row) for point in other.points]
        return _Lines(self.prompts + other.prompts, self.owner + other.owner, self.points + moved)


@dataclass(frozen=True)
class Objective:
    """One optimisation: rows with wanted and unwanted tokens, and much shorter rows whose continuation shall stay.

    The shorter rows run separately, without padding to the length of the others. If there are so few rows that reading
    the weights takes most of the time, all rows run together.
    """

    parts: tuple[_Rows, ...]
    #: h of each target's bare prompt.
    start: Float32[Tensor, "n d"]

    @classmethod
    def of(
        cls,
        arch: Architecture,
        targets: Sequence[ValueTarget],
        token_id: int,
        hparams: UniEraseHyperParams,
        pad_id: int,
        in_front: bool = False,
    ) -> Objective:
        """in_front: whether vectors are added to the last edited block's projection, instead of to its output."""
        asked, masked, kept, bare = _Lines(), _Lines(), _Lines(), []
        for index, target in enumerate(targets):
            bare.append(len(asked.prompts))
            first, share = token_id if target.opening is None else target.opening, 1 / len(target.prompts)
            weight = share * hparams.v_continuation_weight
            follow = target.continuation if weight else ()
            for prompt in target.prompts:
                asked.add(index, prompt, (first, *follow), (share, weight / max(1, len(follow))), (OPENS, FOLLOWS))
                for words, part, kind in (
                    (target.unwanted, share * hparams.v_unlikely_weight, UNWANTED),
                    (target.instead, weight, INSTEAD),
                ):
                    if words and part:
                        masked.add(index, prompt, words, (part / len(words),) * 2, (kind, kind), first)
            if target.kl_prompt and hparams.kl_factor:
                kept.add(index, target.kl_prompt, (0,), (hparams.kl_factor,), (STAYS,))
        if kept.prompts and sum(len(ids) - at for ids, at in asked.prompts) <= FEW_TOKENS:
            asked, kept = asked.joined(kept), _Lines()
        kinds: list[tuple[type[_Rows], _Lines]] = [(_Rows, asked), (_MaskedRows, masked), (_Rows, kept)]
        parts = tuple(
            made.of(arch, lines.prompts, lines.owner, lines.points, hparams.layers[-1], pad_id, in_front)
            for made, lines in kinds
            if lines.prompts
        )
        return cls(parts, parts[0].hidden[bare, 0].float())

    def keep(self, targets: Bool[Tensor, " n"]) -> Objective:
        """The same problem for the targets kept (a mask over targets)."""
        number = targets.long().cumsum(0) - 1
        staying = [(part, targets[part.owner]) for part in self.parts]
        kept = [part.keep(rows) for part, rows in staying if bool(rows.any())]
        return Objective(tuple(replace(part, owner=number[part.owner]) for part in kept), self.start[targets])

    def weights(self) -> Float[Tensor, " n"]:
        """The sum of the weights of each target's likelihoods."""
        total = self.start.new_zeros(len(self.start))
        for part in self.parts:
            aimed = part.looks.kind != STAYS
            total.index_add_(0, part.owner[part.looks.rows[aimed]], part.looks.weight[aimed])
        return total

    def goals(self, arch: Architecture, delta: Float32[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The likelihood part of each target's loss, not divided by its weights."""
        return torch.stack([part.losses(arch, delta) for part in self.parts])[:, :STAYS].sum((0, 1))

    def loss(
        self,
        arch: Architecture,
        delta: Float32[Tensor, "n d"],
        scale: Float[Tensor, " n"],
        hparams: UniEraseHyperParams,
        lever: Float[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """(loss, likelihood part as weighted mean, token's negative log-likelihood) of each target.

        lever: what delta is multiplied by where it is added, if it is added to the projection
        """
        added = delta if lever is None else delta * lever[:, None]
        losses = torch.stack([part.losses(arch, added) for part in self.parts]).sum(0)
        # The gradient of a norm at zero is undefined, so the square root's argument stays above zero.
        norm = (delta.square().sum(1) + 1e-12).sqrt()
        nll = losses[:STAYS].sum(0)
        return (
            nll + losses[STAYS] + hparams.v_weight_decay * norm / scale.square(),
            nll.detach() / self.weights(),
            losses[OPENS].detach(),
        )


class Divergence(torch.autograd.Function):
    """The negative log-likelihood of the wanted token, for each row of logits.

    For the last R rows it is the KL divergence from reference log-probabilities instead. The gradient reuses the memory
    of the one tensor that is kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, reference: Tensor) -> Tensor:
        log_p, first = logits.log_softmax(-1), len(logits) - len(reference)
        ctx.log_p, ctx.reference, ctx.wanted = log_p, reference, wanted.to(logits.device)[:first, None]
        kl = (reference.exp() * (reference - log_p[first:])).sum(-1)
        return torch.cat([-log_p[:first].gather(1, ctx.wanted)[:, 0], kl])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        change: Tensor = ctx.log_p.exp_()
        first = len(ctx.wanted)
        change[:first].scatter_add_(1, ctx.wanted, change.new_full((), -1.0).expand_as(ctx.wanted))
        change[first:] -= ctx.reference.exp()
        return change.mul_(gradients[0][:, None]), None, None


def _telling(logits: Float[Tensor, "N V"], wanted: Int[Tensor, "N 1"]) -> Float[Tensor, " N"]:
    """-log(1 - p) of the unwanted tokens. A token that cannot be said has the logit -inf.

    It is computed as softplus of p's log-odds. So rounding affects neither the loss near p = 1 nor its gradient near
    p = 0, and no gradient of a logit exceeds 1 (unlikelihood: Welleck et al. 2020, arXiv 1908.04319).
    """
    others = logits.scatter(1, wanted, -torch.inf).logsumexp(1)
    return torch.nn.functional.softplus(logits.gather(1, wanted)[:, 0] - others)
