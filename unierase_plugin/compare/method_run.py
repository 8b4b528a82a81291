"""One method, with its settings, one seed and one scenario: it is applied, measured, and audited, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import UniEraseError, WriteError
from ..methods.contract import Progress
from ..storage.atomic import is_full, remove_folder, write_json
from .entries import UNEDITED
from .facts import parts_of
from .made_models import MadeModel, ModelMaker, remove_models
from .measuring import Measurer
from .stages import FAILED, JOB, VALIDATION, MethodRun, Stages, read_json


def run_method(folder: Path, progress: Progress = lambda phase, share, note: None) -> None:
    """Runs the method that the folder's job.json describes. Finished stages are not repeated.

    An error of the method is written to failed.json. Raises WriteError if the disk is full or cannot be written, since
    that is no failure of the method.
    """
    (folder / FAILED).unlink(missing_ok=True)
    try:
        MethodRunner(folder, progress).run()
    except WriteError:
        raise
    except Exception as error:  # whatever a method raises is a row of the table
        if is_full(error):
            raise WriteError(f"{error}. Free some room in {str(folder)!r}, or choose another --out.") from error
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error).lower()
        kind = "out of memory" if memory else type(error).__name__
        remove_models(folder)
        found = {"kind": kind, "error": str(error) or kind, "ours": isinstance(error, UniEraseError)}
        write_json(folder / FAILED, found)


class MethodRunner:
    """Runs the stages of one method in its folder."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder = folder
        self.job = MethodRun(**read_json(folder / JOB))
        self.facts: Mapping[str, Any] = read_json(Path(self.job.facts))
        self.stages = Stages(folder)
        self.maker = ModelMaker(run=self.job, folder=folder, stages=self.stages, facts=self.facts, progress=progress)
        self.measurer = Measurer(self.maker)

    def run(self) -> None:
        """Runs the stages that are not there yet, and marks the folder as done."""
        final = ""
        if self.job.scenario == "precise" and not self.job.is_control:
            self._precisely()
        else:
            made = self._edited()
            self._judge(made)
            final = made.place
        remove_models(self.folder, final if self.job.keep_model else "")
        self.stages.finish(self.job.label)

    def _edited(self) -> MadeModel:
        if self.job.scenario == "sequential" and not self.job.is_control:
            return self._in_steps()
        return self.maker.make("method", self.maker.unedited, self.facts["forget"], self.folder / "model")

    def _in_steps(self) -> MadeModel:
        """The facts in parts, each on the model that the part before left. Each step is measured."""
        parts = parts_of(self.facts["forget"], self.job.steps)
        made = self.maker.unedited
        for at, part in enumerate(parts, start=1):
            so_far = [fact for earlier in parts[:at] for fact in earlier]
            first = self.stages["step-1-method"]
            # A method that changes no weight, such as a prompt guard, starts anew with all facts so far.
            anew = first is not None and first["parameters_changed"] == 0
            start, forget = (self.maker.unedited, so_far) if anew else (made, part)
            before, made = made, self.maker.make(f"step-{at}-method", start, forget, self.folder / f"model-{at}")
            self.stages.once(f"step-{at}", partial(self.measurer.figures, made, so_far, self.facts["keep_shown"]))
            if before.stage:
                remove_folder(Path(before.place))
        steps = [self.stages[f"step-{at}-method"] for at in range(1, len(parts) + 1)]
        self.stages.once("method", lambda: _summed(steps))
        return made

    def _precisely(self) -> None:
        """Every request alone on the unedited model: what is left of it, and what else is lost."""
        found = []
        for at, fact in enumerate(self.facts["forget_shown"], start=1):
            place = self.folder / f"model-{at}"
            made = self.maker.make(f"request-{at}-method", self.maker.unedited, [fact], place)
            measured = partial(self.measurer.figures, made, [fact], self.facts["keep_shown"])
            found.append(self.stages.once(f"request-{at}", measured))
            remove_folder(place)
        count = len(found)
        costs = [self.stages[f"request-{at}-method"] for at in range(1, count + 1)]
        self.stages.once("method", lambda: {**_summed(costs), "seconds": sum(c["seconds"] for c in costs) / count})
        self.stages.once(
            "raw",
            lambda: {
                **{role: _mean_of([each[role] for each in found]) for role in ("forget", "keep")},
                "samples": {
                    "forget": [sample for each in found for sample in each["samples"]["forget"]],
                    "keep": found[-1]["samples"]["keep"],
                },
            },
        )

    def _judge(self, made: MadeModel) -> None:
        job, facts, measurer = self.job, self.facts, self.measurer
        if job.is_try or job.method == UNEDITED:
            measured = partial(measurer.figures, made, facts["forget_validation"], facts["keep_validation"])
            self.stages.once(VALIDATION, measured)
        if job.is_try:
            self._judge_try(made)
            return
        self.stages.once("raw", partial(measurer.figures, made, facts["forget_shown"], facts["keep_shown"]))
        if job.utility:
            self.stages.once("utility", partial(measurer.utility, made))
        if job.bisections and facts["keep"] and not job.is_control:
            self.stages.once("matched", partial(measurer.matched, made, facts["forget_shown"], facts["keep_shown"]))
        if job.audit and not job.is_control:
            self.stages.once("audit", partial(measurer.audited, made))

    def _judge_try(self, made: MadeModel) -> None:
        """Measures a try that keeps too little at equal retention too: a large step is not worse for its length."""
        job, facts = self.job, self.facts
        kept = self.measurer.retention(self.stages[VALIDATION]["keep"])
        if job.bisections and facts["keep_validation"] and not kept >= job.target:
            matched = partial(self.measurer.matched, made, facts["forget_validation"], [], kept)
            self.stages.once("matched", matched)


def _summed(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cost of several runs: the sum of their times, and the largest of the other figures."""
    return {
        **{name: value for name, value in costs[-1].items() if name != "files"},
        "seconds": sum(each["seconds"] for each in costs),
        "interrupted": any(each["interrupted"] for each in costs),
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in costs),
        "parameters_changed": max(each["parameters_changed"] for each in costs),
    }


def _mean_of(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    known = {name: [value for row in rows if (value := row.get(name)) is not None] for name in names}
    return {name: sum(values) / len(values) if values else None for name, values in known.items()}
