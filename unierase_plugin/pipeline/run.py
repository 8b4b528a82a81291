"""One run on one model: asks it, changes it by a method, asks it again, and writes the folder."""

from __future__ import annotations

import datetime
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import checkpoint as files
from ..errors import PluginError, RequestError, StepAppliedError, UniEraseError, shown
from ..evaluation.answers import OF_RUNS
from ..evaluation.report import Outcome, Report, judge
from ..facts.request import ForgetRequest
from ..facts.resources import lines, paragraphs
from ..hparams import EngineSettings, UniEraseHyperParams
from ..methods.contract import Changes, Job, Method, Progress
from ..models.generate import answers, context_limit, perplexity
from ..models.literal import text_ids
from ..models.memory import peak_memory_bytes
from ..models.prompts import encode, has_chat_template, render
from ..models.stored_dtype import round_to_stored
from ..plugins.registration import foreign_code
from ..results import UnlearnResult
from ..session import Session
from ..storage.fingerprints import CACHE_VERSION, digest, model_fingerprint
from ..storage.phases import Phases
from ..storage.tensor_files import Packed

logger = logging.getLogger(__name__)


class UnlearningRun(Phases):
    """One run of any method: asks the model before and after, changes it, and writes the folder."""

    def __init__(
        self,
        session: Session,
        requests: tuple[ForgetRequest, ...],
        retain: tuple[ForgetRequest, ...],
        place: files.OutputFolder | None,
        judged: int,
        progress: Progress,
    ) -> None:
        hparams = session.hparams
        key = digest(
            CACHE_VERSION,
            session.method.name,
            session.loaded.fingerprint,
            session.loaded.tokenizer_fingerprint,
            hparams.as_dict(),
            hparams.seed,
            _plain(requests),
            _plain(retain),
            [judged],
            *self._foreign(session),
        )[:32]
        super().__init__(files.work_folder(place.path, key).root if place else None)
        self.place = place
        self.session, self.method = session, session.method
        self.model, self.tokenizer = session.loaded.model, session.loaded.tokenizer
        self.job = session.job(requests, retain, self.work.root if self.work else None, progress)
        self.secret = digest("answers", _plain(requests), _plain(retain))
        self.judged, self.judged_forget = (*requests[:judged], *retain[:judged]), len(requests[:judged])
        form = hparams.prompt_forms[0]
        self.form = "plain" if form == "chat" and not has_chat_template(self.tokenizer) else form
        self.template_kwargs: dict[str, Any] = hparams.chat_template_kwargs

    def unlearn(self) -> UnlearnResult:
        job = self.job
        with frozen(self.model):
            self.method.check(job)
            self._check_fit()
            with self.timed("evaluate"):
                before, perplexity_before = self._measured("before", "model")
            start = time.perf_counter()
            changes = changes_of(self.method, job)
            round_to_stored(self.model)
            spent = changes.seconds or {self.method.name: time.perf_counter() - start}
            self.model.eval()
            try:
                with self.timed("evaluate"):
                    key = model_fingerprint(self.model) if self.work else ""
                    after, perplexity_after = self._measured("after", key)
                if not math.isfinite(perplexity_after):
                    kept = changes.originals is not None
                    remedy = "Revert it" if kept else "Do not use it: start again from the unedited model"
                    logger.warning(
                        "The edited model gives NaN or infinity on ordinary text: the edit damaged it. %s.", remedy
                    )
                outcomes = self._judged(before, after)
            except BaseException:
                if changes.undo is not None:
                    changes.undo()
                raise
            total = sum(parameter.numel() for parameter in self.model.parameters())
            report = Report(
                model=job.name,
                method=self.method.name,
                forget=outcomes[: self.judged_forget],
                retain=outcomes[self.judged_forget :],
                perplexity_before=perplexity_before,
                perplexity_after=perplexity_after,
                token_leak=changes.token_leak,
                update_norm_ratio=changes.edit.norm_ratios if changes.edit else {},
                parameters_changed=(total if changes.parameters is None else changes.parameters) / total,
                seconds={**spent, **self.seconds},
                peak_memory_bytes=peak_memory_bytes(),
                edit=changes.figures,
            )
        return UnlearnResult(
            model=self.model,
            tokenizer=self.tokenizer,
            method=self.method.name,
            requests=job.requests,
            hparams=job.hparams,
            report=report,
            folder=None,
            changes=changes,
            history=self.session.history_after(changes, job.requests),
        )

    def refuse_applied(self) -> None:
        """Raises StepAppliedError if the folder's last step is this one: the run was stopped after it was written."""
        record = self.session.record
        if self.place is None or not self.place.in_place or record is None or len(record.manifest["steps"]) < 2:
            return
        before, last = record.manifest["steps"][-2:]
        inputs = self._step_inputs(before["model_fingerprint_after"])
        if last.get("id") == files.step_id(record.manifest["salt"], inputs):
            files.discard_work(self.place.path)
            raise StepAppliedError(
                f"{str(self.place.path)!r} has this step already: step {len(record.manifest['steps'])}, of "
                f"{last['created']}, was made from the same requests with the same settings. Nothing was changed. Give "
                "another --seed to apply it again."
            )

    def _step_inputs(self, fingerprint: str) -> list[Any]:
        """The inputs of the step. `fingerprint` is that of the weights before it."""
        job, in_place = self.job, self.place is not None and self.place.in_place
        return [
            self.method.name,
            fingerprint,
            in_place,
            job.hparams.as_dict(),
            job.seed,
            _plain(job.requests),
            _plain(job.retain),
            *self._foreign(self.session),
        ]

    @staticmethod
    def _foreign(session: Session) -> list[Any]:
        """What kept results and the step depend on where a plugin's code takes part."""
        code = foreign_code(session.method.name, session.hparams)
        return [code] if code else []

    def save(self, result: UnlearnResult, place: files.OutputFolder, keep_requests: bool) -> None:
        job, changes, folder = self.job, result.changes, place.path
        job.progress("save", 0.0, str(folder))
        files.save_checkpoint(
            place,
            model=result.model,
            tokenizer=result.tokenizer,
            token=changes.token,
            edit=changes.edit,
            originals=changes.originals,
            requests=job.requests,
            hparams=job.hparams,
            manifest_extra={
                "method": self.method.name,
                "model": job.name,
                "model_fingerprint_before": self.session.loaded.saved_fingerprint,
                "working_fingerprint_before": job.fingerprint,
                "tokenizer_fingerprint_before": self.session.loaded.tokenizer_fingerprint,
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            },
            report=result.report.as_dict(),
            keep_requests=keep_requests,
            earlier=self.session.record,
            step_inputs=self._step_inputs(self.session.loaded.saved_fingerprint),
        )
        files.discard_work(folder)
        job.progress("save", 1.0, str(folder))

    def _check_fit(self) -> None:
        """Raises RequestError for a fact that is longer than the model's context, before the long work."""
        context, room = context_limit(self.model), self._answer_room()
        for fact in self.judged:
            text = render(self.tokenizer, fact.question, self.form, self.template_kwargs)
            needed = len(encode(self.tokenizer, text, self.form)) + room
            if needed > context:
                raise RequestError(
                    f"The question of {fact.label} needs {needed} tokens with its answer, but "
                    f"the model's context holds {context}. Shorten it, or leave it out."
                )

    def _measured(self, phase: str, key: str) -> tuple[list[str], float]:
        """The present model's answers to the judged facts, and its perplexity on ordinary text."""

        def measure() -> Packed:
            level = perplexity(self.model, self.tokenizer, paragraphs("ordinary_text"))
            if phase == "before" and not math.isfinite(level):
                raise UniEraseError(_why_not_finite(self.job.name, self.model))
            return {}, {"said": json.dumps(self._answers(phase)), "perplexity": repr(level)}

        metadata = self.resumed(phase, key, measure)[1]
        # Earlier versions hid the answers.
        said = metadata["said"] if "said" in metadata else files.unseal(metadata["answers"], self.secret)
        return json.loads(said), float(metadata["perplexity"])

    def _answers(self, phase: str) -> list[str]:
        if not self.judged:
            return []
        return answers(
            self.model,
            self.tokenizer,
            [fact.question for fact in self.judged],
            form=self.form,
            template_kwargs=self.template_kwargs,
            max_new_tokens=self._answer_room(),
            max_tokens=2 * self.job.max_tokens,
            progress=lambda share: self.job.progress(phase, share, f"{len(self.judged)} answers"),
        )

    def _answer_room(self) -> int:
        """How many tokens are generated for a judged answer."""
        return OF_RUNS.tokens(len(text_ids(self.tokenizer, fact.answer)) for fact in self.judged)

    def _judged(self, before: Sequence[str], after: Sequence[str]) -> list[Outcome]:
        ends = [text for text in (self.tokenizer.eos_token, self.tokenizer.pad_token) if text]
        # If a method has no token, no answer begins with it.
        hparams = self.job.hparams
        token = (hparams if isinstance(hparams, EngineSettings) else UniEraseHyperParams).unlearning_token
        return [
            judge(fact, old, new, token=token, ends=ends, phrases=lines("idk_phrases"))
            for fact, old, new in zip(self.judged, before, after, strict=True)
        ]


def changes_of(method: Method[Any], job: Job[Any]) -> Changes:
    """Runs the method. Raises PluginError if it gives something else than it is to."""
    found = method.run(job) or Changes()
    if not isinstance(found, Changes):
        raise PluginError(
            f"The method {method.name!r} gave {shown(found)}. It must give a `Changes` of "
            "unierase_plugin.methods.contract, or None. Ask its authors to mend it."
        )
    return found


def _why_not_finite(name: str, model: Any) -> str:
    bad = next((n for n, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())), None)
    if bad is not None:
        return f"The weight {bad!r} of {name!r} holds NaN or infinity. The checkpoint is damaged: fetch it again."
    return (
        f"{name!r} gives NaN or infinity on ordinary text in {model.dtype}. "
        "Load it in another dtype: float32, or bfloat16."
    )


def _plain(requests: Sequence[ForgetRequest]) -> list[list[str | None]]:
    return [[request.question, request.answer, request.subject, request.target] for request in requests]


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Inside the block, no parameter gets a gradient. Training mode and gradients are restored afterwards."""
    training = model.training
    # By name, since room for the token makes the embedding a new parameter.
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(False)  # a method may have trained parameters that its caller had frozen
        for name in wanted:
            model.get_parameter(name).requires_grad_(True)
        model.train(training)
