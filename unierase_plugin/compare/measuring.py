"""Measures the models of a method's run: figures, general ability, equal retention, and the audit."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import EditError
from ..models.loading import load
from .facts import Record
from .figures import retention
from .made_models import MadeModel, ModelMaker
from .matching import Mixture, calibrate
from .measure import Judge
from .stages import VALIDATION, read_json

#: Questions in one batch of lm-eval, if no size is given.
CPU_ROWS, GPU_ROWS = 8, 32


@dataclass(frozen=True)
class Measurer:
    """Measures the models that a maker made. Every method returns what a stage holds."""

    maker: ModelMaker

    def figures(self, made: MadeModel, forget: Sequence[Record], keep: Sequence[Record]) -> dict[str, Any]:
        """The figures of both sets, and what the model said."""
        run, progress = self.maker.run, self.maker.progress
        progress("measure", 0.0, run.label)
        model, judge = self._open(made)
        found = self._figures(judge, forget, keep)
        progress("measure", 1.0, run.label)
        del model, judge
        gc.collect()
        return found

    def utility(self, made: MadeModel) -> dict[str, Any]:
        """The metrics of the tasks of general ability."""
        run, progress = self.maker.run, self.maker.progress
        progress("utility", 0.0, ", ".join(run.utility))
        model, judge = self._open(made)
        found = judge.utility(run.utility, run.utility_limit or None, self.maker.facts["forget"])
        del model
        progress("utility", 1.0, "")
        return found

    def matched(
        self, made: MadeModel, forget: Sequence[Record], keep: Sequence[Record], whole: float | None = None
    ) -> dict[str, Any]:
        """The figures at the share of the edit that keeps as much as the target asks for.

        whole: the retention of the whole edit if it is known. Only a reason is returned if no weight was changed.
        """
        run = self.maker.run
        model, judge = self._open(made)
        original = load(run.model, run.device, run.dtype)[0]
        mixture = Mixture(model, original)
        del original
        gc.collect()
        if not mixture:
            return {"alpha": None, "why": "no weight is changed, so there is nothing to mix"}
        found = calibrate(partial(self._kept, mixture, judge), run.target, run.bisections, whole)
        mixture.set(found.alpha)
        return {
            "alpha": found.alpha,
            "retention_validation": found.retention,
            "tried": [list(each) for each in found.tried],
            **self._figures(judge, forget, keep),
        }

    def audited(self, made: MadeModel) -> dict[str, Any]:
        """The verdict of an audit, and the mean of each attack on the edited model."""
        from ..audit.runner import audit

        run, facts = self.maker.run, self.maker.facts
        names = ("question", "answer", "subject", "perturbed_answer")
        found = audit(
            self.maker.place(made),
            [{name: fact[name] for name in names if name in fact} for fact in facts["forget_shown"]],
            out=self.maker.folder / "audit",
            retain=facts["keep_shown"] or None,
            allow_overlap=True,
            base=run.model,
            reference=run.reference or None,
            attacks=list(run.audit),
            seed=run.seed,
            device=run.device,
            dtype=run.dtype,
            progress=self.maker.progress,
        )
        shares = {each["name"]: each.get("shares", {}).get("edited", {}).get("mean") for each in found["attacks"]}
        return {"verdict": found["verdict"], "attacks": shares}

    def retention(self, kept: Mapping[str, float | None]) -> float:
        """The share of the validation facts to keep that is kept, relative to the unedited model."""
        return retention(kept, read_json(Path(self.maker.run.before))[VALIDATION]["keep"])

    def _open(self, made: MadeModel) -> tuple[Any, Judge]:
        """The model and lm-eval's view of it. Raises EditError for a weight that is not finite."""
        run = self.maker.run
        model, tokenizer = load(self.maker.place(made), run.device, run.dtype)
        bad = next((name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())), None)
        if bad is not None:
            raise EditError(f"The weight {bad!r} holds NaN or infinity after {run.label!r}.")
        rows = run.batch_size or (CPU_ROWS if model.device.type == "cpu" else GPU_ROWS)
        return model, Judge(model, tokenizer, rows, run.metrics)

    def _figures(self, judge: Judge, forget: Sequence[Record], keep: Sequence[Record]) -> dict[str, Any]:
        forgotten, said = judge.facts(forget, "forget", self._ratios(forget))
        self.maker.progress("measure", 0.5, self.maker.run.label)
        kept, answers = judge.facts(keep, "keep") if keep else ({}, [])
        return {"forget": forgotten, "keep": kept, "samples": {"forget": said, "keep": answers}}

    def _ratios(self, forget: Sequence[Record]) -> list[float] | None:
        """The reference model's truth ratios of these facts; None unless they are known for all."""
        ratios = self.maker.run.ratios
        found = read_json(Path(ratios)) if ratios else None
        known = {each["question"]: each.get("truth_ratio") for each in found["samples"]["forget"]} if found else {}
        wanted = [known.get(fact["question"]) for fact in forget]
        return None if None in wanted else [float(ratio) for ratio in wanted if ratio is not None]

    def _kept(self, mixture: Mixture, judge: Judge, alpha: float) -> float:
        self.maker.progress("match", 0.0, f"alpha {alpha:g}")
        mixture.set(alpha)
        return self.retention(judge.facts(self.maker.facts["keep_validation"], "keep")[0])
