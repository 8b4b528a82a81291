"""A whole removal: moments, teacher, passes, factors. Every part that takes long is kept when it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import EditError
from ..hparams import RemovalSettings
from ..locate_then_edit.edit import WeightEdit, apply_edit
from ..locate_then_edit.solve import LowRank
from ..models.architecture import Architecture
from ..models.weights import restored
from ..storage.fingerprints import digest
from ..storage.phases import Phases
from ..storage.tensor_files import Packed
from .course import TEACHER_SHARE, Budget, Course, Planning, Progress, by_layer
from .distil import (
    Lesson,
    Pass,
    divergence,
    factorised,
    lessons,
    openings,
    read_in_pass,
    searched,
    take_pass,
    write_changed,
)
from .factors import Truncated, truncated
from .moments import RemovalData
from .teacher import ask, read_weight, replaced

#: Part of every key. Raise it when the computation changes.
VERSION = "5"
#: Share of a removal's progress at which its passes are done.
PASSES_SHARE = 0.95


@dataclass(frozen=True)
class Removal:
    """A removal as data: factors by layer, without keys for later edits to protect, and figures of its quality."""

    edit: WeightEdit
    figures: Mapping[str, Any]


def remove(
    arch: Architecture,
    data: RemovalData,
    settings: RemovalSettings,
    *,
    max_tokens: int,
    pad_id: int,
    seed: int,
    key: str,
    phases: Phases,
    progress: Progress = lambda share, note: None,
) -> Removal:
    """Computes the removal. Afterwards the model is as before, to the bit.

    settings    settings with settled blocks (`settle_removal`)
    seed        seed of the tokens that are drawn for the outputs' moments
    key         digest of everything else that the result depends on: model, facts, texts
    phases      times the parts, and keeps each when it ends: a second start continues at the pass of the first

    Raises EditError if the model overflows on the data, or if no pass lowers the loss.
    """
    names = [spec.name for spec in fields(RemovalSettings)]
    key = digest(VERSION, key, {name: getattr(settings, name) for name in names})[:32]
    run = _Distillation(
        arch=arch,
        data=data,
        settings=settings,
        budget={"max_tokens": max_tokens, "pad_id": pad_id},
        seed=seed,
        key=key,
        phases=phases,
        progress=progress,
    )
    return _unpack_removal(*phases.resumed("removal", key, run.packed))


@dataclass(frozen=True)
class _Distillation:
    """One removal under way. Expensive parts are computed when they are first needed."""

    arch: Architecture
    data: RemovalData
    settings: RemovalSettings
    budget: Budget
    seed: int
    key: str
    phases: Phases
    progress: Progress

    def packed(self) -> Packed:
        layers = self.settings.removal_layers
        with restored(self.arch.projections[layer].weight for layer in layers):
            change, taken = self._passes()
            cut = {layer: truncated(each, self.settings.removal_rank) for layer, each in change.items()}
            edit = WeightEdit(
                {layer: each.factors for layer, each in cut.items()},
                norm_ratios={
                    layer: each.factors.norm() / float(self.originals[layer].float().norm())
                    for layer, each in cut.items()
                },
                removed={layer: each.factors.up.shape[1] for layer, each in cut.items()},
            )
            figures = self._figures(edit, cut, taken)
        self.progress(1.0, "")
        return _pack_removal(Removal(edit, figures))

    def _passes(self) -> tuple[dict[int, Tensor], list[Pass]]:
        """The change (d, m) by layer after all passes, and each pass's figures. Passes end if no step helps."""
        change = {layer: torch.zeros_like(each, dtype=torch.float32) for layer, each in self.originals.items()}
        taken: list[Pass] = []
        for number in range(self._count):
            if taken and not taken[-1].fraction and number != self.settings.removal_passes:
                continue
            if taken and taken[-1].declined is not None and taken[-1].declined <= self.settings.removal_decline_nll:
                break
            before = change
            tensors, metadata = self.phases.resumed(
                "removal-pass",
                f"{self.key}-{number + 1}",
                lambda: self._pass(number, before),  # noqa: B023 (called at once)
            )
            change = {layer: tensors[str(layer)].to(each.device) for layer, each in self.originals.items()}
            taken.append(Pass(**json.loads(metadata["pass"])))
        # If the model hardly knows the facts, there is nothing to remove, but refusing can still be learned.
        if taken and not any(each.fraction for each in taken):
            raise EditError(
                "No step of the removal lowers its loss, so nothing was changed. If the model knows the facts, "
                f"raise removal_ridge ({self.settings.removal_ridge}) and removal_output_ridge "
                f"({self.settings.removal_output_ridge}), lower removal_keep_weight "
                f"({self.settings.removal_keep_weight}), or load the model in float32."
            )
        return change, taken

    @property
    def _count(self) -> int:
        """The most passes: those of the removal, then those that also learn the replacement answers, until learned."""
        s = self.settings
        learns = bool(self.data.instead and s.removal_decline_weight)
        return s.removal_passes + (s.removal_decline_passes if learns else 0)

    def _pass(self, number: int, change: Mapping[int, Tensor]) -> Packed:
        count = self._count

        def tell(share: float) -> None:
            done = (number + share) / count
            self.progress(TEACHER_SHARE + (PASSES_SHARE - TEACHER_SHARE) * done, f"pass {number + 1} of {count}")

        stays = (read_in_pass(kind, number) for kind in (self.kept_lessons, self.neighbour_lessons))
        said = self.openings if number >= self.settings.removal_passes else []
        kinds, factors = (self.lessons, said, *stays), self.factors
        with self.phases.timed("passes"):
            after, made = take_pass(
                self.arch,
                [each for kind in kinds for each in kind],
                self.originals,
                change,
                factors,
                searched(kinds),
                **self.budget,
                progress=tell,
            )
            if said:
                made = replace(made, declined=self._declined())
        return {str(layer): each for layer, each in after.items()}, {"pass": json.dumps(asdict(made))}

    def _declined(self) -> float:
        """Negative log-likelihood of the replacement answers under the present weights, in nats."""
        found = divergence(self.arch, self.openings, **self.budget)
        return found / self.settings.removal_decline_weight

    @cached_property
    def originals(self) -> dict[int, Tensor]:
        """The original weights (d, m), by layer."""
        return {layer: read_weight(self.arch, layer).clone() for layer in self.settings.removal_layers}

    @cached_property
    def course(self) -> Course:
        """The teacher, and the moments of what is kept."""
        return Course.unpacked(*self.phases.resumed("removal-course", self.key, self._planned), self.data)

    @cached_property
    def lessons(self) -> list[Lesson]:
        """The teacher's targets for the forgotten answers."""
        return lessons(self.course.teacher)

    @cached_property
    def openings(self) -> list[Lesson]:
        """The replacement answers; none if their weight is 0."""
        if not self.settings.removal_decline_weight:
            return []
        return openings(self.data.instead, self.data.instead_starts, self.settings.removal_decline_weight)

    @cached_property
    def kept_lessons(self) -> list[Lesson]:
        """The unedited model's distributions on facts to keep; none if their weight is 0."""
        return self._unchanged(self.data.kept, self.data.kept_starts)

    @cached_property
    def neighbour_lessons(self) -> list[Lesson]:
        """The same for neighbours."""
        return self._unchanged(self.data.neighbours, self.data.neighbour_starts)

    @cached_property
    def factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Cholesky factors of R and S by layer, for all passes."""
        s = self.settings
        with self.phases.timed("passes"):
            return {
                layer: (
                    factorised(self.course.inputs[layer].to(each.device), s.removal_ridge),
                    factorised(self.course.outputs[layer].to(each.device), s.removal_output_ridge),
                )
                for layer, each in self.originals.items()
            }

    def _planned(self) -> Packed:
        planning = Planning(
            arch=self.arch,
            data=self.data,
            settings=self.settings,
            budget=self.budget,
            seed=self.seed,
            phases=self.phases,
            progress=self.progress,
        )
        with replaced(self.arch, self.originals):
            return planning.course().packed()

    def _unchanged(self, sequences: Sequence[tuple[int, ...]], starts: Sequence[int]) -> list[Lesson]:
        if not self.settings.removal_keep_weight or not sequences:
            return []
        with self.phases.timed("teacher"), replaced(self.arch, self.originals):
            return lessons(ask(self.arch, sequences, starts, **self.budget), self.settings.removal_keep_weight)

    def _figures(self, edit: WeightEdit, cut: Mapping[int, Truncated], taken: list[Pass]) -> dict[str, Any]:
        """The figures for the report. The final losses are those of the factors, not of the whole change."""
        write_changed(self.arch, self.originals, {layer: torch.zeros(()) for layer in self.originals})
        apply_edit(self.arch, edit)

        def left(taught: list[Lesson], weight: float) -> float | None:
            if not taught:
                return None
            return divergence(self.arch, taught, **self.budget) / weight

        with self.phases.timed("passes"):
            lost, stayed = left(self.lessons, 1.0), left(self.kept_lessons, self.settings.removal_keep_weight)
            declined = self._declined() if self.openings else None
        return {
            "losses": [each.loss for each in taken],
            "steps": [each.fraction for each in taken],
            "rates": [each.rate for each in taken],
            "divergence_from_teacher": lost,
            "divergence_on_kept": stayed,
            "nll_of_what_is_said_instead": declined,
            **self.course.notes,
            "kept_facts": len(self.data.kept),
            "neighbours": len(self.data.neighbours),
            "energy_kept": {str(layer): each.energy for layer, each in cut.items()},
            "rank_90": {str(layer): each.ranks[0] for layer, each in cut.items()},
            "rank_99": {str(layer): each.ranks[1] for layer, each in cut.items()},
        }


# --- Kept between two starts ------------------------------------------------------------------------------------------


def _pack_removal(removal: Removal) -> Packed:
    edit = removal.edit
    tensors = {f"up.{layer}": each.up for layer, each in edit.updates.items()}
    tensors.update({f"down.{layer}": each.down for layer, each in edit.updates.items()})
    ratios = {str(layer): ratio for layer, ratio in edit.norm_ratios.items()}
    return tensors, {"norm_ratios": json.dumps(ratios), "figures": json.dumps(removal.figures)}


def _unpack_removal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Removal:
    downs = by_layer(tensors, "down")
    updates = {layer: LowRank(up, downs[layer]) for layer, up in by_layer(tensors, "up").items()}
    ratios = {int(layer): ratio for layer, ratio in json.loads(metadata["norm_ratios"]).items()}
    removed = {layer: each.up.shape[1] for layer, each in updates.items()}
    return Removal(WeightEdit(updates, norm_ratios=ratios, removed=removed), json.loads(metadata["figures"]))
