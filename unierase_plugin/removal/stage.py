"""The whole of a removal: moments, teacher, passes, factors. Every part that takes long is kept when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, TypedDict

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
from .fisher import output_moments
from .moments import Material, Moments, answer_positions, take_moments, weighed
from .strangers import ask_strangers
from .teacher import Teacher, ask, calibrated, read_weight, replaced, said_at

#: Part of every key: raised when what is computed changes.
VERSION = "5"
#: Of a removal's progress, what is over when the inputs' moments, all moments, teacher and passes are done.
INPUTS_SHARE, MOMENTS_SHARE, TEACHER_SHARE, PASSES_SHARE = 0.2, 0.35, 0.4, 0.95

#: Every how many-th of the ordinary texts tells what the projections' outputs matter to.
TEXT_SHARE = 3


class _Budget(TypedDict):
    """What every pass through the model is told."""

    max_tokens: int
    pad_id: int


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
    seed: int,
    key: str,
    phases: Phases,
    progress: Progress = lambda share, note: None,
) -> Removal:
    """Computes the removal; the model is as before when it returns, to the bit.

    settings    with their blocks settled (`settle_removal`)
    seed        of the draws that the outputs' moments are taken by
    key         digest of everything else that the result depends on: model, facts, texts
    phases      times the parts, and keeps each when it ends: a second start goes on at the pass where the first was

    Raises EditError where the model overflows on the material, and where no first step helps.
    """
    names = [spec.name for spec in fields(RemovalSettings)]
    key = digest(VERSION, key, {name: getattr(settings, name) for name in names})[:32]
    run = _Run(arch, material, settings, max_tokens, pad_id, seed, key, phases, progress)
    return _unpack_removal(*phases.resumed("removal", key, run.packed))


@dataclass(frozen=True)
class _Course:
    """What the passes follow: the teacher, and what is to be left alone."""

    teacher: Teacher
    #: R (m, m) by layer: second moments of the projections' inputs.
    inputs: Mapping[int, Tensor]
    #: S (d, d) by layer: second moments of gradients at their outputs.
    outputs: Mapping[int, Tensor]
    #: Tokens that each moment was taken over by name, facts that each teacher taught, the filter's lambda.
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class _Run:
    """One removal under way. What is expensive is computed when it is first needed, and only then."""

    arch: Architecture
    material: Material
    settings: RemovalSettings
    max_tokens: int
    pad_id: int
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
        """The change (d, m) by layer after all passes, and what each did; fewer where one finds no step that helps."""
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
        # Facts that the model hardly knows leave nothing to remove, and can be declined all the same.
        if taken and not any(each.fraction for each in taken):
            raise EditError(
                "No step of a removal lowers its loss, so that nothing was changed. Where the model knows the facts, "
                f"raise removal_ridge ({self.settings.removal_ridge}) and removal_output_ridge "
                f"({self.settings.removal_output_ridge}), lower removal_keep_weight "
                f"({self.settings.removal_keep_weight}), or load the model in float32."
            )
        return change, taken

    @property
    def _count(self) -> int:
        """Passes at most: those of the removal, then those in which declining is learned too until it is."""
        s = self.settings
        learns = bool(self.material.instead and s.removal_decline_weight)
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
                max_tokens=self.max_tokens,
                pad_id=self.pad_id,
                progress=tell,
            )
            if said:
                made = replace(made, declined=self._declined())
        return {str(layer): each for layer, each in after.items()}, {"pass": json.dumps(asdict(made))}

    def _declined(self) -> float:
        """How unlikely the model, as it is now, is to say what is to be said instead, in nats."""
        found = divergence(self.arch, self.openings, max_tokens=self.max_tokens, pad_id=self.pad_id)
        return found / self.settings.removal_decline_weight

    @cached_property
    def originals(self) -> dict[int, Tensor]:
        """Weights (d, m) as they were, by layer."""
        return {layer: read_weight(self.arch, layer).clone() for layer in self.settings.removal_layers}

    @cached_property
    def course(self) -> _Course:
        return _unpack_course(*self.phases.resumed("removal-course", self.key, self._take_course), self.material)

    @cached_property
    def lessons(self) -> list[Lesson]:
        """What the teacher says of forgotten answers."""
        return lessons(self.course.teacher)

    @cached_property
    def openings(self) -> list[Lesson]:
        """What is to be said instead of them; none where that weighs nothing."""
        if not self.settings.removal_decline_weight:
            return []
        return openings(self.material.instead, self.material.instead_starts, self.settings.removal_decline_weight)

    @cached_property
    def kept_lessons(self) -> list[Lesson]:
        """What the unedited model says on facts to keep; none where that weighs nothing."""
        return self._unchanged(self.material.kept, self.material.kept_starts)

    @cached_property
    def neighbour_lessons(self) -> list[Lesson]:
        """The same on neighbours."""
        return self._unchanged(self.material.neighbours, self.material.neighbour_starts)

    @cached_property
    def factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Cholesky factors of R and S by layer, which serve all passes."""
        s = self.settings
        with self.phases.timed("passes"):
            return {
                layer: (
                    factorised(self.course.inputs[layer].to(each.device), s.removal_ridge),
                    factorised(self.course.outputs[layer].to(each.device), s.removal_output_ridge),
                )
                for layer, each in self.originals.items()
            }

    def _take_course(self) -> Packed:
        s, m = self.settings, self.material
        with replaced(self.arch, self.originals):
            with self.phases.timed("teacher"):
                said = self._said()
                told = ask_strangers(self.arch, m, said, **self._budget) if s.removal_strangers else {}
            # Only what strangers know as well needs the blunter teacher.
            rest = [row for row in range(len(m.forget)) if row not in told]
            with self.phases.timed("moments"):
                found = take_moments(
                    self.arch,
                    m,
                    sorted({*s.removal_layers, *(s.removal_teacher_layers if rest else ())}),
                    rest,
                    progress=lambda share: self.progress(INPUTS_SHARE * share, "moments"),
                    **self._budget,
                )
                outputs = self._output_moments()
            with self.phases.timed("teacher"):
                strength, heard = self._filtered(found, rest)
        answers: dict[int, tuple[Tensor, tuple[float, ...]]] = {
            row: (each, ()) for row, each in zip(rest, heard, strict=True)
        }
        answers.update({row: (each.log_probs, each.weights) for row, each in told.items()})
        log_probs, weights = zip(*(answers[row] for row in range(len(m.forget))), strict=True)
        tokens = {spec.name: part.count if (part := getattr(found, spec.name)) else 0 for spec in fields(found)}
        return _pack_course(
            _Course(
                Teacher(m.forget, self._spots, log_probs, weights),
                weighed(
                    [
                        (s.removal_retain_weight, found.kept),
                        (s.removal_retain_weight, found.neighbours),
                        (s.removal_text_weight, found.text),
                        (s.removal_words_weight, found.words),
                    ],
                    s.removal_layers,
                ),
                outputs,
                {
                    "moment_tokens": tokens,
                    "taught": {"strangers": len(told), "filter": len(rest)},
                    "strength": strength,
                },
            )
        )

    def _unchanged(self, sequences: Sequence[tuple[int, ...]], starts: Sequence[int]) -> list[Lesson]:
        if not self.settings.removal_keep_weight or not sequences:
            return []
        with self.phases.timed("teacher"), replaced(self.arch, self.originals):
            return lessons(ask(self.arch, sequences, starts, **self._budget), self.settings.removal_keep_weight)

    @property
    def _budget(self) -> _Budget:
        return {"max_tokens": self.max_tokens, "pad_id": self.pad_id}

    @property
    def _spots(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(answer_positions, self.material.forget, self.material.forget_starts))

    def _said(self) -> tuple[Tensor, ...]:
        """What the unedited model says at every token of the forgotten answers."""
        return said_at(self.arch, self.material.forget, self._spots, **self._budget)

    def _filtered(self, found: Moments, rest: Sequence[int]) -> tuple[float | None, tuple[Tensor, ...]]:
        """The filter's strength and what it says of the facts `rest`; None and nothing where there are none."""
        s = self.settings
        if found.forgotten is None:
            return None, ()
        stays = weighed([(1.0, found.kept), (1.0, found.neighbours), (1.0, found.text)], s.removal_teacher_layers)
        return calibrated(
            self.arch,
            s.removal_teacher_layers,
            found.forgotten.moments,
            stays,
            [self.material.forget[row] for row in rest],
            [self._spots[row] for row in rest],
            s.removal_teacher_probability,
            progress=lambda share: self.progress(MOMENTS_SHARE + (TEACHER_SHARE - MOMENTS_SHARE) * share, "teacher"),
            **self._budget,
        )

    def _output_moments(self) -> dict[int, Tensor]:
        """Of facts to keep and neighbours where they are answered, and of some of the ordinary text, in equal parts."""
        m, text = self.material, self.material.text[::TEXT_SHARE]
        groups = (
            (m.kept, tuple(map(answer_positions, m.kept, m.kept_starts))),
            (m.neighbours, tuple(map(answer_positions, m.neighbours, m.neighbour_starts))),
            (text, tuple(tuple(range(len(ids) - 1)) for ids in text)),
        )
        total, seen = sum(len(sequences) for sequences, _ in groups), 0
        found = []
        for sequences, positions in groups:
            if not sequences:
                continue

            def tell(share: float, begun: int = seen, size: int = len(sequences)) -> None:
                done = (begun + share * size) / total
                self.progress(INPUTS_SHARE + (MOMENTS_SHARE - INPUTS_SHARE) * done, "moments of the outputs")

            found.append(
                output_moments(
                    self.arch,
                    sequences,
                    positions,
                    self.settings.removal_layers,
                    seed=self.seed,
                    progress=tell,
                    **self._budget,
                )
            )
            seen += len(sequences)
        return {layer: torch.stack([each[layer] for each in found]).mean(0) for layer in self.settings.removal_layers}

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
            declined = self._declined() if self.openings else None
        return {
            "losses": [each.loss for each in taken],
            "steps": [each.fraction for each in taken],
            "rates": [each.rate for each in taken],
            "divergence_from_teacher": lost,
            "divergence_on_kept": stayed,
            "nll_of_what_is_said_instead": declined,
            **self.course.notes,
            "kept_facts": len(self.material.kept),
            "neighbours": len(self.material.neighbours),
            "energy_kept": {str(layer): each.energy for layer, each in cut.items()},
            "rank_90": {str(layer): each.ranks[0] for layer, each in cut.items()},
            "rank_99": {str(layer): each.ranks[1] for layer, each in cut.items()},
        }


# --- Kept between two starts ------------------------------------------------------------------------------------------


def _pack_course(course: _Course) -> Packed:
    """Without the facts themselves, which the next start is given again."""
    tensors = {f"inputs.{layer}": each for layer, each in course.inputs.items()}
    tensors.update({f"outputs.{layer}": each for layer, each in course.outputs.items()})
    tensors.update({f"said.{row}": each for row, each in enumerate(course.teacher.log_probs)})
    return tensors, {"weights": json.dumps(course.teacher.weights), "notes": json.dumps(course.notes)}


def _unpack_course(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], material: Material) -> _Course:
    facts, weights = material.forget, json.loads(metadata["weights"])
    spots = tuple(map(answer_positions, facts, material.forget_starts))
    said = tuple(tensors[f"said.{row}"] for row in range(len(facts)))
    teacher = Teacher(facts, spots, said, tuple(map(tuple, weights)))
    return _Course(teacher, _by_layer(tensors, "inputs"), _by_layer(tensors, "outputs"), json.loads(metadata["notes"]))


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
