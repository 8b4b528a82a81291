"""One cell in a process of its own: `python -m unierase_plugin.compare.cell FOLDER`.

A process of its own has a peak of memory of its own, and ends alone where memory runs out. It tells its progress on
standard output, a line of JSON each, and ends when its standard input does, so that it does not outlive who started it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import EditError, UniEraseError, WriteError
from ..methods.contract import Progress
from ..models.loading import load
from ..models.memory import peak_memory_bytes
from ..pipeline import unlearn
from ..storage.atomic import is_full, remove_folder, write_json, write_text
from ..storage.locks import folder_lock
from .entries import REFERENCE, UNEDITED, Entry, settings_of
from .facts import Record, parts_of
from .figures import retention
from .matching import Mixture, calibrate
from .measure import Judge
from .stages import CANNOT_WRITE, FAILED, JOB, Cell, Stages, contents, read_json

#: Questions of one batch of lm-eval where none is given.
CPU_ROWS, GPU_ROWS = 8, 32
#: Seconds that a cell waits for one that was started before it in the same folder.
PATIENCE = 120.0
#: Parts of the facts' file: what is reported, and what is chosen by.
SHOWN, VALIDATION = "shown", "validation"


def run_cell(folder: Path, progress: Progress = lambda phase, share, note: None) -> None:
    """Does what the folder's job says, as far as its stages are not there yet; an error is left in `failed.json`.

    Raises WriteError where the disk is full or cannot be written: that is no method's failure.
    """
    (folder / FAILED).unlink(missing_ok=True)
    try:
        _Run(folder, progress).run()
    except WriteError:
        raise
    except Exception as error:  # whatever a method raises is a row of the table
        if is_full(error):
            raise WriteError(f"{error}. Free some room in {str(folder)!r}, or choose another --out.") from error
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error).lower()
        kind = "out of memory" if memory else type(error).__name__
        _remove_models(folder)
        found = {"kind": kind, "error": str(error) or kind, "ours": isinstance(error, UniEraseError)}
        write_json(folder / FAILED, found)


def _remove_models(folder: Path, but: str = "") -> None:
    """The cell's models and what unfinished runs left beside them; `but` is the folder of one that stays."""
    for pattern in ("model*", ".model*"):
        for made in folder.glob(pattern):
            if str(made) != but:
                remove_folder(made)
    for begun in folder.glob("*.begun"):
        begun.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Model:
    """A model's folder or hub id; where a stage made it, what is needed to make it again."""

    place: str
    stage: str = ""
    start: _Model | None = None
    forget: Sequence[Record] = ()


class _Run:
    """What the stages of a cell share."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder, self.progress = folder, progress
        self.cell = Cell(**read_json(folder / JOB))
        self.stages = Stages(folder)
        self.facts: Mapping[str, Any] = read_json(Path(self.cell.facts))
        self.unedited = _Model(self.cell.model)

    def run(self) -> None:
        cell, final = self.cell, ""
        if cell.scenario == "precise" and not self._is_control:
            self._precisely()
        else:
            made = self._edited()
            self._judge(made)
            final = made.place
        _remove_models(self.folder, final if cell.keep_model else "")
        self.stages.finish(cell.label)

    def _edited(self) -> _Model:
        if self.cell.scenario == "sequential" and not self._is_control:
            return self._in_steps()
        return self._edit("method", self.unedited, self.facts["forget"], self.folder / "model")

    @property
    def _is_control(self) -> bool:
        """A model that is judged as it is."""
        return self.cell.method in (UNEDITED, REFERENCE)

    # --- the method --------------------------------------------------------------------------------------------------

    def _edit(self, stage: str, start: _Model, forget: Sequence[Record], out: Path) -> _Model:
        """The model after the method; its cost and settings are the stage."""
        if self._is_control:
            self.stages.once(stage, lambda: {"seconds": 0.0, "peak_memory_bytes": None, "parameters_changed": 0.0})
            return _Model(self.cell.reference) if self.cell.method == REFERENCE else start
        made = _Model(str(out), stage, start, forget)
        self.stages.once(stage, partial(self._make, made))
        return made

    def _place(self, model: _Model) -> str:
        """The model's folder, whole: made again where it is not what its stage left."""
        if model.stage and (self.stages[model.stage] or {}).get("files") != contents(Path(model.place)):
            self.stages[model.stage] = self._make(model)
        return model.place

    def _make(self, model: _Model) -> dict[str, Any]:
        """Cost, settings and contents of a model that is then there."""
        start = self._place(model.start or self.unedited)
        found = self._unlearn(model.stage, start, model.forget, Path(model.place))
        return {**found, "files": contents(Path(model.place))}

    def _unlearn(self, stage: str, start: str, forget: Sequence[Record], out: Path) -> dict[str, Any]:
        cell = self.cell
        entry = Entry(cell.label, cell.method, cell.changes)
        more = {**cell.tried, "seed": cell.seed, **({"mom2_dataset": cell.corpus} if cell.corpus else {})}
        settings = settings_of(entry, cell.model, more)
        begun = self.folder / f"{stage}.begun"
        interrupted = begun.exists()
        write_text(begun, "")
        remove_folder(out)
        result = unlearn(
            start,
            _requests(forget),
            method=cell.method,
            retain=_requests(self.facts["keep"]) or None,
            # Looked at for the whole comparison, before any cell.
            allow_overlap=True,
            hparams=settings,
            out=out,
            judged=0,
            seed=cell.seed,
            device=cell.device,
            dtype=cell.dtype,
            max_batch_tokens=cell.max_batch_tokens,
            progress=self.progress,
        )
        begun.unlink()
        report = result.report
        phases = {name: spent for name, spent in report.seconds.items() if name != "evaluate"}
        return {
            "seconds": sum(phases.values()),
            "phases": phases,
            # A run that was killed and went on did part of its work before.
            "interrupted": interrupted,
            "device": _device_name(result.model.device),
            "peak_memory_bytes": peak_memory_bytes(),
            "parameters_changed": report.parameters_changed,
            "perplexity": {"before": report.perplexity_before, "after": report.perplexity_after},
            "settings": settings.as_dict(),
            "figures": report.edit,
        }

    def _in_steps(self) -> _Model:
        """The facts in parts, one after another on the model that the part before left; each step is measured."""
        parts = parts_of(self.facts["forget"], self.cell.steps)
        made = self.unedited
        for at, part in enumerate(parts, start=1):
            so_far = [fact for earlier in parts[:at] for fact in earlier]
            first = self.stages["step-1-method"]
            # What changes no weight, such as a guard of the prompt, names all facts so far instead of a further one.
            anew = first is not None and first["parameters_changed"] == 0
            start, forget = (self.unedited, so_far) if anew else (made, part)
            before, made = made, self._edit(f"step-{at}-method", start, forget, self.folder / f"model-{at}")
            self.stages.once(f"step-{at}", partial(self._measured, made, so_far, self.facts["keep_shown"]))
            if before.stage:
                remove_folder(Path(before.place))
        steps = [self.stages[f"step-{at}-method"] for at in range(1, len(parts) + 1)]
        self.stages.once("method", lambda: _summed(steps))
        return made

    def _precisely(self) -> None:
        """Every request by itself on the unedited model, what is left of it and what else has gone."""
        found = []
        for at, fact in enumerate(self.facts["forget_shown"], start=1):
            made = self._edit(f"request-{at}-method", self.unedited, [fact], self.folder / f"model-{at}")
            found.append(
                self.stages.once(f"request-{at}", partial(self._measured, made, [fact], self.facts["keep_shown"]))
            )
            remove_folder(Path(made.place))
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

    # --- judging -----------------------------------------------------------------------------------------------------

    def _judge(self, made: _Model) -> None:
        cell, facts = self.cell, self.facts
        if cell.is_try or cell.method == UNEDITED:
            self.stages.once(
                VALIDATION, partial(self._measured, made, facts["forget_validation"], facts["keep_validation"])
            )
        if cell.is_try:
            self._judge_try(made)
            return
        self.stages.once("raw", partial(self._measured, made, facts["forget_shown"], facts["keep_shown"]))
        if cell.utility:
            self.stages.once("utility", partial(self._utility, made))
        if cell.bisections and facts["keep"] and not self._is_control:
            self.stages.once("matched", partial(self._matched, made, facts["forget_shown"], facts["keep_shown"]))
        if cell.audit and not self._is_control:
            self.stages.once("audit", partial(self._audited, made))

    def _judge_try(self, made: _Model) -> None:
        """A try that keeps too little is read at equal retention: a long step is not worse for having gone too far."""
        cell, facts = self.cell, self.facts
        kept = self._retention(self.stages[VALIDATION]["keep"])
        if cell.bisections and facts["keep_validation"] and not kept >= cell.target:
            self.stages.once("matched", partial(self._matched, made, facts["forget_validation"], [], kept))

    def _open(self, made: _Model) -> tuple[Any, Judge]:
        """The model, checked, and lm-eval's view of it."""
        model, tokenizer = load(self._place(made), self.cell.device, self.cell.dtype)
        bad = next((name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())), None)
        if bad is not None:
            raise EditError(f"The weight {bad!r} holds NaN or infinity after {self.cell.label!r}.")
        rows = self.cell.batch_size or (CPU_ROWS if model.device.type == "cpu" else GPU_ROWS)
        return model, Judge(model, tokenizer, rows)

    def _measured(self, made: _Model, forget: Sequence[Record], keep: Sequence[Record]) -> dict[str, Any]:
        self.progress("measure", 0.0, self.cell.label)
        model, judge = self._open(made)
        found = self._figures(judge, forget, keep)
        self.progress("measure", 1.0, self.cell.label)
        del model, judge
        gc.collect()
        return found

    def _figures(self, judge: Judge, forget: Sequence[Record], keep: Sequence[Record]) -> dict[str, Any]:
        ratios = self._ratios(forget)
        forgotten, said = judge.facts(forget, "forget", ratios)
        self.progress("measure", 0.5, self.cell.label)
        kept, answers = judge.facts(keep, "keep") if keep else ({}, [])
        return {"forget": forgotten, "keep": kept, "samples": {"forget": said, "keep": answers}}

    def _ratios(self, forget: Sequence[Record]) -> list[float] | None:
        """The reference's truth ratios of these facts; None where it is not known for all."""
        found = read_json(Path(self.cell.ratios)) if self.cell.ratios else None
        known = {each["question"]: each.get("truth_ratio") for each in found["samples"]["forget"]} if found else {}
        wanted = [known.get(fact["question"]) for fact in forget]
        return None if None in wanted else [float(ratio) for ratio in wanted if ratio is not None]

    def _utility(self, made: _Model) -> dict[str, Any]:
        self.progress("utility", 0.0, ", ".join(self.cell.utility))
        model, judge = self._open(made)
        found = judge.utility(self.cell.utility, self.cell.utility_limit or None, self.facts["forget"])
        del model
        self.progress("utility", 1.0, "")
        return found

    def _matched(
        self, made: _Model, forget: Sequence[Record], keep: Sequence[Record], whole: float | None = None
    ) -> dict[str, Any]:
        """Figures where as much is kept as the target asks for; only a reason where there is nothing to mix.

        whole: retention of the model as it is, where it is known.
        """
        cell = self.cell
        model, judge = self._open(made)
        original = load(cell.model, cell.device, cell.dtype)[0]
        mixture = Mixture(model, original)
        del original
        gc.collect()
        if not mixture:
            return {"alpha": None, "why": "no weight is changed, so there is nothing to mix"}
        found = calibrate(partial(self._kept, mixture, judge), cell.target, cell.bisections, whole)
        mixture.set(found.alpha)
        return {
            "alpha": found.alpha,
            "retention_validation": found.retention,
            "tried": [list(each) for each in found.tried],
            **self._figures(judge, forget, keep),
        }

    def _kept(self, mixture: Mixture, judge: Judge, alpha: float) -> float:
        self.progress("match", 0.0, f"alpha {alpha:g}")
        mixture.set(alpha)
        return self._retention(judge.facts(self.facts["keep_validation"], "keep")[0])

    def _retention(self, kept: Mapping[str, float | None]) -> float:
        """Of what was kept of the validation facts before."""
        return retention(kept, read_json(Path(self.cell.before))[VALIDATION]["keep"])

    def _audited(self, made: _Model) -> dict[str, Any]:
        from ..audit.runner import audit

        cell = self.cell
        names = ("question", "answer", "subject", "perturbed_answer", "paraphrases")
        facts = [{name: fact[name] for name in names if name in fact} for fact in self.facts["forget_shown"]]
        found = audit(
            self._place(made),
            facts,
            out=self.folder / "audit",
            retain=self.facts["keep_shown"] or None,
            allow_overlap=True,
            base=cell.model,
            reference=cell.reference or None,
            attacks=list(cell.audit),
            seed=cell.seed,
            device=cell.device,
            dtype=cell.dtype,
            progress=self.progress,
        )
        shares = {each["name"]: each.get("shares", {}).get("edited", {}).get("mean") for each in found["attacks"]}
        return {"verdict": found["verdict"], "attacks": shares}


def _device_name(device: torch.device) -> str:
    """What a method's time is of: cells of one comparison may have run on several machines."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{device.type}, {_processor()}, {threads} thread{'' if threads == 1 else 's'}"


def _processor() -> str:
    """Its make where the system tells (Linux on x86), else the kind of machine."""
    try:
        made = re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        made = None
    return made[1].strip() if made else platform.processor() or platform.machine()


def _requests(facts: Sequence[Record]) -> list[dict[str, Any]]:
    names = ("question", "answer", "subject")
    return [{name: fact[name] for name in names if fact.get(name)} for fact in facts]


def _summed(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cost of several runs: their times added up, the largest of the rest."""
    return {
        **{name: value for name, value in costs[-1].items() if name != "files"},
        "seconds": sum(each["seconds"] for each in costs),
        "interrupted": any(each["interrupted"] for each in costs),
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in costs),
        "parameters_changed": max(each["parameters_changed"] for each in costs),
    }


def _mean_of(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """By metric, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    known = {name: [value for row in rows if (value := row.get(name)) is not None] for name in names}
    return {name: sum(values) / len(values) if values else None for name, values in known.items()}


# --- the process -----------------------------------------------------------------------------------------------------


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(3)


def _told(phase: str, share: float, note: str = "") -> None:
    sys.stdout.write(json.dumps([phase, share, note]) + "\n")
    sys.stdout.flush()


def main(folder: str) -> None:
    """The cell in `folder`, told on standard output."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start = time.monotonic()
    try:
        # One that was started before may still be on its way out, when who started it was killed.
        with folder_lock(Path(folder), PATIENCE):
            run_cell(Path(folder), _told)
    except WriteError as error:
        _told(CANNOT_WRITE, 0.0, str(error))
        raise SystemExit(1) from None
    _told("cell", 1.0, f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1])
