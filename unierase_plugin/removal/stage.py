"""The whole of a removal: moments, teacher, passes, factors. Every part that takes long is kept when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..architecture import Architecture
from ..hparams import RemovalSettings
from ..locate_then_edit.edit import WeightEdit, apply_edit, restored
from ..locate_then_edit.solve import LowRank
from ..phases import Phases
from ..store import Packed, digest
from .distil import Lesson, Pass, divergence, factorised, lessons, take_pass, write_changed
from .factors import Truncated, truncated
from .moments import Material, take_moments, weighed
from .teacher import Teacher, ask, filtered_weights, read_weight, replaced

#: Part of every key: raised when what is computed changes.
VERSION = "1"
#: Of a removal's progress, what is over when moments, teacher and passes are done.
MOMENTS_SHARE, TEACHER_SHARE, PASSES_SHARE = 0.4, 0.5, 0.95

#: Called with (share done from 0 to 1, note).
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Removal:
    """A removal as data: factors by layer, without keys for later edits to protect, and how well it went."""

    edit: WeightEdit
    figures: Mapping[str, Any]


def remove(
    arch: Architecture,
    material: Material,
    settings: RemovalSettings,
    *,
    max_tokens: int,
    pad_id: int,
    key: str,
    phases: Phases,
    progress: Progress = lambda share, note: None,
) -> Removal:
    """Computes the removal; the model is as before when it returns, to the bit.

    settings    with their blocks settled (`settle_removal`)
    key         digest of everything else that the result depends on: model, facts, texts
    phases      times the parts, and keeps each when it ends: a second start goes on at the pass where the first was

    Raises EditError where the model overflows on the material.
    """
    names = [spec.name for spec in fields(RemovalSettings)]
    key = digest(VERSION, key, {name: getattr(settings, name) for name in names})[:32]
    run = _Run(arch, material, settings, max_tokens, pad_id, key, phases, progress)
    return _unpack_removal(*phases.resumed("removal", key, run.packed))


@dataclass(frozen=True)
class _Course:
    """What the passes follow: the teacher, and the second moments R (m, m) of what is to be left alone, by layer."""

    teacher: Teacher
    metric: Mapping[int, Tensor]
    #: Tokens that each moment was taken over, by name.
    counts: Mapping[str, int]


@dataclass(frozen=True)
class _Run:
    """One removal under way. What is expensive is computed when it is first needed, and only then."""

    arch: Architecture
    material: Material
    settings: RemovalSettings
    max_tokens: int
    pad_id: int
    key: str
    phases: Phases
    progress: Progress

    def packed(self) -> Packed:
        layers = self.settings.removal_layers
        with restored(self.arch, layers):
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
        """The change (d, m) by layer after all passes, and what each did; fewer where one finds no step that helps."""
        change = {layer: torch.zeros_like(each, dtype=torch.float32) for layer, each in self.originals.items()}
        taken: list[Pass] = []
        for number in range(self.settings.removal_passes):
            if taken and not taken[-1].fraction:
                break
            before = change
            tensors, metadata = self.phases.resumed(
                "removal-pass", f"{self.key}-{number + 1}", lambda: self._pass(number, before)  # noqa: B023 (called at once)
            )  # fmt: skip
            change = {layer: tensors[str(layer)].to(each.device) for layer, each in self.originals.items()}
            taken.append(Pass(**json.loads(metadata["pass"])))
        return change, taken

    def _pass(self, number: int, change: Mapping[int, Tensor]) -> Packed:
        count = self.settings.removal_passes

        def tell(share: float) -> None:
            done = (number + share) / count
            self.progress(TEACHER_SHARE + (PASSES_SHARE - TEACHER_SHARE) * done, f"pass {number + 1} of {count}")

        taught, factors = [*self.lessons, *self.kept_lessons], self.factors
        with self.phases.timed("passes"):
            after, made = take_pass(
                self.arch, taught, self.originals, change, factors, max_tokens=self.max_tokens, pad_id=self.pad_id,
                progress=tell,
            )  # fmt: skip
        return {str(layer): each for layer, each in after.items()}, {"pass": json.dumps(asdict(made))}

    @cached_property
    def originals(self) -> dict[int, Tensor]:
        """Weights (d, m) as they were, by layer."""
        return {layer: read_weight(self.arch, layer).clone() for layer in self.settings.removal_layers}

    @cached_property
    def course(self) -> _Course:
        return _unpack_course(*self.phases.resumed("removal-course", self.key, self._take_course))

    @cached_property
    def lessons(self) -> list[Lesson]:
        return lessons(self.course.teacher)

    @cached_property
    def kept_lessons(self) -> list[Lesson]:
        """What the unedited model says on facts to keep; none where that weighs nothing."""
        if not self.settings.removal_keep_weight or not self.material.kept:
            return []
        with self.phases.timed("teacher"), replaced(self.arch, self.originals):
            said = ask(
                self.arch, self.material.kept, self.material.kept_starts, max_tokens=self.max_tokens, pad_id=self.pad_id
            )
        return lessons(said, self.settings.removal_keep_weight)

    @cached_property
    def factors(self) -> dict[int, Tensor]:
        """Cholesky factors of R by layer, which serve all passes."""
        with self.phases.timed("passes"):
            return {
                layer: factorised(self.course.metric[layer].to(each.device), self.settings.removal_ridge)
                for layer, each in self.originals.items()
            }

    def _take_course(self) -> Packed:
        s = self.settings
        both = sorted({*s.removal_layers, *s.removal_teacher_layers})
        with replaced(self.arch, self.originals):
            with self.phases.timed("moments"):
                found = take_moments(
                    self.arch, self.material, both, max_tokens=self.max_tokens, pad_id=self.pad_id,
                    progress=lambda share: self.progress(MOMENTS_SHARE * share, "moments"),
                )  # fmt: skip
            with self.phases.timed("teacher"):
                stays = weighed([(1.0, found.kept), (1.0, found.text)], s.removal_teacher_layers)
                weights = filtered_weights(
                    self.arch, s.removal_teacher_layers, found.forgotten.moments, stays, s.removal_teacher_weight
                )
                with replaced(self.arch, weights):
                    teacher = ask(
                        self.arch, self.material.forget, self.material.forget_starts, max_tokens=self.max_tokens,
                        pad_id=self.pad_id, progress=lambda share: self.progress(
                            MOMENTS_SHARE + (TEACHER_SHARE - MOMENTS_SHARE) * share, "teacher"
                        ),
                    )  # fmt: skip
        metric = weighed(
            [
                (s.removal_retain_weight, found.kept),
                (s.removal_text_weight, found.text),
                (s.removal_words_weight, found.words),
            ],
            s.removal_layers,
        )
        counts = {spec.name: part.count if (part := getattr(found, spec.name)) else 0 for spec in fields(found)}
        return _pack_course(_Course(teacher, metric, counts))

    def _figures(self, edit: WeightEdit, cut: Mapping[int, Truncated], taken: list[Pass]) -> dict[str, Any]:
        """What is told of it; the losses at the end are those of the factors, not of the whole change."""
        write_changed(self.arch, self.originals, {layer: torch.zeros(()) for layer in self.originals})
        apply_edit(self.arch, edit)

        def left(taught: list[Lesson], weight: float) -> float | None:
            if not taught:
                return None
            return divergence(self.arch, taught, max_tokens=self.max_tokens, pad_id=self.pad_id) / weight

        with self.phases.timed("passes"):
            lost, stayed = left(self.lessons, 1.0), left(self.kept_lessons, self.settings.removal_keep_weight)
        return {
            "losses": [each.loss for each in taken], "steps": [each.fraction for each in taken],
            "rates": [each.rate for each in taken], "divergence_from_teacher": lost, "divergence_on_kept": stayed,
            "moment_tokens": dict(self.course.counts), "kept_facts": len(self.material.kept),
            "energy_kept": {str(layer): each.energy for layer, each in cut.items()},
            "rank_90": {str(layer): each.ranks[0] for layer, each in cut.items()},
            "rank_99": {str(layer): each.ranks[1] for layer, each in cut.items()},
        }  # fmt: skip


# --- Kept between two starts ------------------------------------------------------------------------------------------


def _pack_course(course: _Course) -> Packed:
    tensors = {f"metric.{layer}": each for layer, each in course.metric.items()}
    tensors.update({f"said.{row}": each for row, each in enumerate(course.teacher.log_probs)})
    others = [course.teacher.sequences, course.teacher.positions, dict(course.counts)]
    return tensors, {"course": json.dumps(others)}


def _unpack_course(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> _Course:
    sequences, positions, counts = json.loads(metadata["course"])
    said = tuple(tensors[f"said.{row}"] for row in range(len(sequences)))
    teacher = Teacher(tuple(map(tuple, sequences)), tuple(map(tuple, positions)), said)
    return _Course(teacher, _by_layer(tensors, "metric"), counts)


def _pack_removal(removal: Removal) -> Packed:
    edit = removal.edit
    tensors = {f"up.{layer}": each.up for layer, each in edit.updates.items()}
    tensors.update({f"down.{layer}": each.down for layer, each in edit.updates.items()})
    ratios = {str(layer): ratio for layer, ratio in edit.norm_ratios.items()}
    return tensors, {"norm_ratios": json.dumps(ratios), "figures": json.dumps(removal.figures)}


def _unpack_removal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Removal:
    downs = _by_layer(tensors, "down")
    updates = {layer: LowRank(up, downs[layer]) for layer, up in _by_layer(tensors, "up").items()}
    ratios = {int(layer): ratio for layer, ratio in json.loads(metadata["norm_ratios"]).items()}
    removed = {layer: each.up.shape[1] for layer, each in updates.items()}
    return Removal(WeightEdit(updates, norm_ratios=ratios, removed=removed), json.loads(metadata["figures"]))


def _by_layer(tensors: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    found = {int(key.rpartition(".")[2]): each for key, each in tensors.items() if key.startswith(f"{name}.")}
    return dict(sorted(found.items()))
