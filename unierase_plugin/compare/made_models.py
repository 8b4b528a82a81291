"""The models that a method's run makes. Each is made once, and again only if its folder is damaged or gone."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..methods.contract import Progress
from ..models.memory import peak_memory_bytes
from ..pipeline import unlearn
from ..storage.atomic import remove_folder, write_text
from .entries import REFERENCE, Entry, settings_of
from .facts import Record
from .stages import MethodRun, Stages, contents


@dataclass(frozen=True)
class MadeModel:
    """A model's folder or hub id; if a stage made it, also what is needed to make it again."""

    place: str
    stage: str = ""
    start: MadeModel | None = None
    forget: Sequence[Record] = ()


@dataclass(frozen=True)
class ModelMaker:
    """Applies the method of a run, and keeps its cost and settings as a stage."""

    run: MethodRun
    folder: Path
    stages: Stages
    #: What facts.json holds.
    facts: Mapping[str, Any]
    progress: Progress

    @property
    def unedited(self) -> MadeModel:
        """The model that the comparison starts from."""
        return MadeModel(self.run.model)

    def make(self, stage: str, start: MadeModel, forget: Sequence[Record], out: Path) -> MadeModel:
        """The model after the method. A control is the model as it is."""
        if self.run.is_control:
            self.stages.once(stage, lambda: {"seconds": 0.0, "peak_memory_bytes": None, "parameters_changed": 0.0})
            return MadeModel(self.run.reference) if self.run.method == REFERENCE else start
        made = MadeModel(place=str(out), stage=stage, start=start, forget=forget)
        self.stages.once(stage, partial(self._make, made))
        return made

    def place(self, model: MadeModel) -> str:
        """The folder of a model, which is made again if it is not what its stage left."""
        if model.stage and (self.stages[model.stage] or {}).get("files") != contents(Path(model.place)):
            self.stages[model.stage] = self._make(model)
        return model.place

    def _make(self, model: MadeModel) -> dict[str, Any]:
        start = self.place(model.start or self.unedited)
        found = self._unlearn(model.stage, start, model.forget, Path(model.place))
        return {**found, "files": contents(Path(model.place))}

    def _unlearn(self, stage: str, start: str, forget: Sequence[Record], out: Path) -> dict[str, Any]:
        run = self.run
        entry = Entry(run.label, run.method, run.changes)
        more = {**run.tried, "seed": run.seed, **({"mom2_dataset": run.corpus} if run.corpus else {})}
        settings = settings_of(entry, run.model, more)
        begun = self.folder / f"{stage}.begun"
        interrupted = begun.exists()
        write_text(begun, "")
        remove_folder(out)
        result = unlearn(
            start,
            _requests(forget),
            method=run.method,
            retain=_requests(self.facts["keep"]) or None,
            # The comparison has checked this for all methods at once.
            allow_overlap=True,
            hparams=settings,
            out=out,
            judged=0,
            seed=run.seed,
            device=run.device,
            dtype=run.dtype,
            max_batch_tokens=run.max_batch_tokens,
            progress=self.progress,
        )
        begun.unlink()
        report = result.report
        phases = {name: spent for name, spent in report.seconds.items() if name != "evaluate"}
        return {
            "seconds": sum(phases.values()),
            "phases": phases,
            # Part of the work of a killed run was done before, so its time is too short.
            "interrupted": interrupted,
            "device": _device_name(result.model.device),
            "peak_memory_bytes": peak_memory_bytes(),
            "parameters_changed": report.parameters_changed,
            "perplexity": {"before": report.perplexity_before, "after": report.perplexity_after},
            "settings": settings.as_dict(),
            "figures": report.edit,
        }


def remove_models(folder: Path, but: str = "") -> None:
    """Removes the models of a run, and what unfinished runs left beside them. but: the folder of a model that stays."""
    for pattern in ("model*", ".model*"):
        for made in folder.glob(pattern):
            if str(made) != but:
                remove_folder(made)
    for begun in folder.glob("*.begun"):
        begun.unlink(missing_ok=True)


def _requests(facts: Sequence[Record]) -> list[dict[str, Any]]:
    names = ("question", "answer", "subject")
    return [{name: fact[name] for name in names if fact.get(name)} for fact in facts]


def _device_name(device: torch.device) -> str:
    """The device that a time was measured on: runs of one comparison may be from several machines."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{device.type}, {_processor()}, {threads} thread{'' if threads == 1 else 's'}"


def _processor() -> str:
    """The processor's make if the system tells it (Linux on x86), else the kind of machine."""
    try:
        made = re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        made = None
    return made[1].strip() if made else platform.processor() or platform.machine()
