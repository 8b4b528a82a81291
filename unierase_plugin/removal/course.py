"""What the passes of a removal need, computed once before them: the teacher, and the moments of what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..hparams import RemovalSettings
from ..models.architecture import Architecture
from ..storage.phases import Phases
from ..storage.tensor_files import Packed
from .fisher import output_moments
from .moments import Moments, RemovalData, answer_positions, take_moments, weighed
from .strangers import ask_strangers
from .teacher import Teacher, calibrated, said_at

#: Shares of a removal's progress at which the inputs' moments, all moments, and the teacher are done.
INPUTS_SHARE, MOMENTS_SHARE, TEACHER_SHARE = 0.2, 0.35, 0.4
#: The outputs' moments use every TEXT_SHARE-th ordinary text.
TEXT_SHARE = 3

#: Called with (share done from 0 to 1, note).
Progress = Callable[[float, str], None]


class Budget(TypedDict):
    """Arguments of every pass through the model."""

    max_tokens: int
    pad_id: int


@dataclass(frozen=True)
class Course:
    """What the passes need: the teacher, and the moments of what is kept."""

    teacher: Teacher
    #: R (m, m) by layer: second moments of the projections' inputs.
    inputs: Mapping[int, Tensor]
    #: S (d, d) by layer: second moments of gradients at their outputs.
    outputs: Mapping[int, Tensor]
    #: Tokens behind each moment, by name; facts that each kind of teacher taught; the filter's lambda.
    notes: Mapping[str, Any]

    def packed(self) -> Packed:
        """The contents of one file. The facts are left out, since the next start gets them again."""
        tensors = {f"inputs.{layer}": each for layer, each in self.inputs.items()}
        tensors.update({f"outputs.{layer}": each for layer, each in self.outputs.items()})
        tensors.update({f"said.{row}": each for row, each in enumerate(self.teacher.log_probs)})
        return tensors, {"weights": json.dumps(self.teacher.weights), "notes": json.dumps(self.notes)}

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], data: RemovalData) -> Course:
        """The course from the contents that `packed` gave, for the same data."""
        facts, weights = data.forget, json.loads(metadata["weights"])
        said = tuple(tensors[f"said.{row}"] for row in range(len(facts)))
        teacher = Teacher(facts, _spots(data), said, tuple(map(tuple, weights)))
        return cls(teacher, by_layer(tensors, "inputs"), by_layer(tensors, "outputs"), json.loads(metadata["notes"]))


def by_layer(tensors: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    """The tensors `name.LAYER` of a file, from the lowest layer up."""
    found = {int(key.rpartition(".")[2]): each for key, each in tensors.items() if key.startswith(f"{name}.")}
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Planning:
    """Makes a course from the unedited model. The model has its original weights before and after."""

    arch: Architecture
    data: RemovalData
    settings: RemovalSettings
    budget: Budget
    #: Seed of the tokens that are drawn for the outputs' moments.
    seed: int
    phases: Phases
    progress: Progress

    def course(self) -> Course:
        """Asks with strangers' names, takes the moments, and makes the filter for facts that strangers cannot teach."""
        s, m = self.settings, self.data
        with self.phases.timed("teacher"):
            # The unedited model's log-probabilities at every token of the forgotten answers.
            said = said_at(self.arch, m.forget, _spots(m), **self.budget)
            told = ask_strangers(self.arch, m, said, **self.budget) if s.removal_strangers else {}
        # Only facts that the model gives for strangers too need the blunter teacher.
        rest = [row for row in range(len(m.forget)) if row not in told]
        with self.phases.timed("moments"):
            found = take_moments(
                self.arch,
                m,
                sorted({*s.removal_layers, *(s.removal_teacher_layers if rest else ())}),
                rest,
                progress=lambda share: self.progress(INPUTS_SHARE * share, "moments"),
                **self.budget,
            )
            outputs = self._output_moments()
        with self.phases.timed("teacher"):
            strength, heard = self._filtered(found, rest)
        answers: dict[int, tuple[Tensor, tuple[float, ...]]] = {
            row: (each, ()) for row, each in zip(rest, heard, strict=True)
        }
        answers.update({row: (each.log_probs, each.weights) for row, each in told.items()})
        log_probs, weights = zip(*(answers[row] for row in range(len(m.forget))), strict=True)
        inputs = weighed(
            [
                (s.removal_retain_weight, found.kept),
                (s.removal_retain_weight, found.neighbours),
                (s.removal_text_weight, found.text),
                (s.removal_words_weight, found.words),
            ],
            s.removal_layers,
        )
        tokens = {spec.name: part.count if (part := getattr(found, spec.name)) else 0 for spec in fields(found)}
        taught = {"strangers": len(told), "filter": len(rest)}
        return Course(
            teacher=Teacher(m.forget, _spots(m), log_probs, weights),
            inputs=inputs,
            outputs=outputs,
            notes={"moment_tokens": tokens, "taught": taught, "strength": strength},
        )

    def _filtered(self, found: Moments, rest: Sequence[int]) -> tuple[float | None, tuple[Tensor, ...]]:
        """The filter's strength and its log-probabilities for the facts `rest`; (None, ()) if there are none."""
        s, spots = self.settings, _spots(self.data)
        if found.forgotten is None:
            return None, ()
        stays = weighed([(1.0, found.kept), (1.0, found.neighbours), (1.0, found.text)], s.removal_teacher_layers)
        return calibrated(
            self.arch,
            s.removal_teacher_layers,
            found.forgotten.moments,
            stays,
            [self.data.forget[row] for row in rest],
            [spots[row] for row in rest],
            s.removal_teacher_probability,
            progress=lambda share: self.progress(MOMENTS_SHARE + (TEACHER_SHARE - MOMENTS_SHARE) * share, "teacher"),
            **self.budget,
        )

    def _output_moments(self) -> dict[int, Tensor]:
        """Moments at the answers of facts to keep and of neighbours, and in some ordinary text, in equal parts."""
        m, text = self.data, self.data.text[::TEXT_SHARE]
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
                    **self.budget,
                )
            )
            seen += len(sequences)
        return {layer: torch.stack([each[layer] for each in found]).mean(0) for layer in self.settings.removal_layers}


def _spots(data: RemovalData) -> tuple[tuple[int, ...], ...]:
    """Positions whose next token belongs to a forgotten answer."""
    return tuple(map(answer_positions, data.forget, data.forget_starts))
