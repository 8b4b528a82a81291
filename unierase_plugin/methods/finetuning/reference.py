"""The forward passes of a training step, and the figures of the model before training (the reference).

There is no second model in memory. A term needs only a number for each answer (its log-likelihood), or a vector for
each position. That vector is the input of the LM head, from which a frozen copy of the head's weight gives all logits
again, or the state after the block that RMU watches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...models.architecture import Architecture
from ...models.examples import Example
from ...models.generate import pad_token_id
from ...models.trace import Trace, pad, run_blocks, token_batches
from ...unlearning_token import logit_scale
from ..contract import Job
from .batches import TrainingData
from .terms import RETAIN, RETAIN_DECLINED, Looked, Term


@dataclass
class Reference:
    """Figures of the model before training that the terms need, by part and number of the sequence."""

    likelihoods: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    #: (T - 1, d) inputs of the LM head at all positions that predict a token.
    head_inputs: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    #: (T, d) after the watched block.
    states: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    #: The LM head, frozen: (V, d) and (V,); empty where no term needs logits.
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor | None = None


class Watched:
    """The model in training, with what a forward pass needs: parts, precision, padding, and the watched block."""

    def __init__(self, job: Job[Any], arch: Architecture, layer: int) -> None:
        self.arch = arch
        self.layer, self.pad_id, self.max_tokens = layer, pad_token_id(job.model, job.tokenizer), job.max_tokens
        self.half = job.model.dtype in (torch.bfloat16, torch.float16)
        self.scale = logit_scale(self.arch)
        self.cap = getattr(job.model.config.get_text_config(), "final_logit_softcapping", None)

    def autocast(self) -> Any:
        return torch.autocast(self.arch.device.type, torch.bfloat16) if self.half else nullcontext()

    def pass_over(self, sequences: Sequence[Example], first: Sequence[int]) -> tuple[Trace, Tensor, Tensor]:
        """One pass over N positions: its trace, the tokens (N,) that follow the positions, and their sequences (N,).

        first: the index of the first of these tokens in each sequence.
        """
        batch = pad([sequence.ids for sequence in sequences], self.pad_id, "right", self.arch.device)
        spots = [
            (row, at - 1, sequence.ids[at])
            for row, (sequence, start) in enumerate(zip(sequences, first, strict=True))
            for at in range(start, len(sequence.ids))
        ]
        rows, columns, wanted = torch.tensor(spots).T.to(self.arch.device)
        return run_blocks(self.arch, batch, head_at=(rows, columns)), wanted, rows

    def states(self, sequences: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """States (N, d) of all positions after the watched block, and their sequences (N,)."""
        batch = pad([sequence.ids for sequence in sequences], self.pad_id, "right", self.arch.device)
        rows, columns = batch.mask.nonzero(as_tuple=True)
        hidden = run_blocks(self.arch, batch, last=self.layer).hidden
        return hidden[rows.to(hidden.device), columns.to(hidden.device)], rows.to(hidden.device)

    def logits_of(self, head_inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits for inputs of the LM head, with this weight of the head."""
        raw = self.scale * torch.nn.functional.linear(head_inputs, weight, bias)
        return raw if self.cap is None else self.cap * torch.tanh(raw / self.cap)


@torch.no_grad()
def take_reference(
    model: Watched, data: TrainingData, terms: Sequence[Term], keeps_head: bool, progress: Callable[[float], None]
) -> Reference:
    """The figures of the model as it is now.

    keeps_head: whether the LM head is not trained. Its weight then needs no copy.
    """
    found = Reference()
    todo = [
        (kind, part)
        for kind in ("likelihoods", "logits", "states")
        for part in dict.fromkeys(part for term in terms for part in getattr(term, kind))
    ]
    for at, (kind, part) in enumerate(todo):
        numbers, everything = data.used(part), data.sequences[part]
        done = 0
        for rows in token_batches([everything[number].ids for number in numbers], model.max_tokens):
            chosen = [numbers[row] for row in rows]
            with model.autocast():
                _take(found, kind, part, model, chosen, [everything[number] for number in chosen])
            done += len(rows)
            progress((at + done / len(numbers)) / len(todo))
    if found.head_inputs:
        head = model.arch.head
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        found.weight = weight if keeps_head else weight.clone()
        found.bias = bias if keeps_head or bias is None else bias.clone()
    return found


def _take(
    found: Reference, kind: str, part: str, model: Watched, numbers: Sequence[int], sequences: Sequence[Example]
) -> None:
    if kind == "states":
        states, rows = model.states(sequences)
        parts = states.cpu().split(rows.bincount(minlength=len(numbers)).tolist())
        found.states.setdefault(part, {}).update(zip(numbers, parts, strict=True))
        return
    whole = kind == "logits"
    trace, wanted, rows = model.pass_over(sequences, [1 if whole else each.start for each in sequences])
    if whole:
        parts = trace.head_inputs.cpu().split(rows.bincount(minlength=len(numbers)).tolist())
        found.head_inputs.setdefault(part, {}).update(zip(numbers, parts, strict=True))
        return
    likelihoods = Looked(trace.logits, wanted.to(trace.logits.device), rows.to(trace.logits.device), len(numbers))
    found.likelihoods.setdefault(part, {}).update(zip(numbers, likelihoods.log_likelihoods.cpu(), strict=True))


class Batch:
    """What the terms may ask of one batch. What two terms ask for is computed once."""

    def __init__(
        self, model: Watched, data: TrainingData, reference: Reference, direction: Tensor, pairs: Tensor
    ) -> None:
        self.model, self.data, self.reference, self._direction = model, data, reference, direction
        self.pairs = pairs.tolist()
        self._seen: dict[tuple[str, bool], Looked] = {}

    def answers(self, part: str) -> Looked:
        return self._looked(part, False)

    def texts(self, part: str) -> Looked:
        return self._looked(part, True)

    def states(self, part: str) -> tuple[Tensor, Tensor, int]:
        states, rows = self.model.states(self._sequences(part))
        return states, rows, len(self.pairs)

    def reference_likelihoods(self, part: str) -> Tensor:
        known = self.reference.likelihoods[part]
        return torch.stack([known[number] for number in self._numbers(part)]).to(self.model.arch.device)

    @torch.no_grad()
    def reference_logits(self, part: str, whole: bool) -> Tensor:
        known, weight = self.reference.head_inputs[part], self.reference.weight
        cut = [
            known[number][0 if whole else sequence.start - 1 :]
            for number, sequence in zip(self._numbers(part), self._sequences(part), strict=True)
        ]
        return self.model.logits_of(torch.cat(cut).to(weight.device), weight, self.reference.bias)

    def reference_states(self, part: str) -> Tensor:
        known = self.reference.states[part]
        return torch.cat([known[number] for number in self._numbers(part)]).to(self.model.arch.device)

    def direction(self) -> Tensor:
        return self._direction

    def _numbers(self, part: str) -> list[int]:
        return [pair[part in (RETAIN, RETAIN_DECLINED)] for pair in self.pairs]

    def _sequences(self, part: str) -> list[Example]:
        return [self.data.sequences[part][number] for number in self._numbers(part)]

    def _looked(self, part: str, whole: bool) -> Looked:
        if (part, whole) not in self._seen:
            sequences = self._sequences(part)
            trace, wanted, rows = self.model.pass_over(sequences, [1 if whole else s.start for s in sequences])
            place = trace.logits.device
            self._seen[part, whole] = Looked(trace.logits, wanted.to(place), rows.to(place), len(sequences))
        return self._seen[part, whole]
