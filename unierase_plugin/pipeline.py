"""A whole run: reads the requests, judges the model, changes it by a method, judges it again, writes the folder.

Every phase that takes long is kept when it ends, so a run that was killed continues where it stopped. Token and
statistics are in the user's cache, since other runs use them too. Answers, values and the edit are beside the output
folder.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint as files
from .errors import CheckpointError, PluginError, RequestError, StepAppliedError, UniEraseError, shown
from .evaluation.answers import OF_RUNS
from .evaluation.report import Outcome, Report, judge
from .facts.readers import Requests, read_requests
from .facts.request import ForgetRequest, check_overlap, check_requests, with_subjects
from .facts.resources import lines, paragraphs
from .hparams import HARDENED, REMOVED, EngineSettings, HyperParams, UniEraseHyperParams
from .methods.contract import Changes, History, Job, Method, Progress
from .methods.editing.engine import corpus_of
from .methods.editing.unierase import UNIERASE
from .models.disk_space import model_size, weights_size
from .models.generate import answers, context_limit, perplexity
from .models.literal import text_ids
from .models.memory import peak_memory_bytes
from .models.prompts import encode, has_chat_template, render
from .models.stored_dtype import round_to_stored
from .plugins.registration import registry
from .results import UnlearnResult
from .session import Session
from .settings.ranges import Range
from .statistics.collection import CorpusMoment
from .statistics.distributed import Processes
from .statistics.files import FINGERPRINTS
from .storage.atomic import check_disk_space, clear_leftovers
from .storage.fingerprints import CACHE_VERSION, digest, model_fingerprint
from .storage.phases import Phases
from .storage.tensor_files import Packed, pack, write_tensors

logger = logging.getLogger(__name__)


def unlearn(
    model: Any,
    forget: Requests,
    *,
    method: str | Method[Any] = "unierase",
    tokenizer: Any = None,
    retain: Requests | None = None,
    allow_overlap: bool = False,
    hparams: HyperParams | str | os.PathLike[str] | None = None,
    corpus: str | None = None,
    harden: bool = False,
    remove: bool = False,
    reverse: bool | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    keep_requests: bool = False,
    judged: int = 400,
    seed: int | None = None,
    device: str = "",
    dtype: str = "",
    max_batch_tokens: int = 0,
    progress: Progress = lambda phase, share, note: None,
) -> UnlearnResult:
    """Makes a model forget given facts. With UniErase it then answers with the unlearning token and "I don't know".

    Args:
        model: A folder, a hub id, a loaded causal LM, or the result of an earlier call. A loaded model needs
            `tokenizer` too, and is edited in place. A result, or a folder that was edited before, gets one more step.
        forget: A SPEC such as `tofu:forget01`, or ForgetRequests, or mappings with question, answer and optionally
            subject.
        method: Name of a registered method (see `unierase methods`), or a Method.
        tokenizer: The tokenizer of a loaded model.
        retain: Facts to keep, given like `forget`. The method protects them (UniErase: by their keys), and they are
            judged.
        allow_overlap: Whether a fact to keep may also be a fact to forget, or one that an earlier step forgot. The
            method then gets two opposite aims for it.
        hparams: An object, a YAML file, or a shipped file's stem. Without it: the shipped file for this model, else
            the defaults.
        corpus: Text for the second moment, if the method needs one: "self", a text file, or a hub dataset as
            name[:config[:column]].
        harden: Whether to harden the edit against attacks. Sets `hparams.HARDENED`, whatever `hparams` says. The
            setting `harden` names single ways.
        remove: Whether to remove the model's knowledge of the facts, and then to teach it what to say instead. Sets
            `hparams.REMOVED`, whatever `hparams` says. The method "removal" does only the first part.
        reverse: Whether to forget the way back from the answer to the subject too. The default is the value in
            `hparams`.
        out: The output folder. Without it only the caches are written.
        overwrite: Whether the output of an earlier run in `out` may be replaced.
        keep_requests: Whether the record holds the facts in the clear, beside their hashes.
        judged: The most facts of each set that are answered before and after.
        seed: Seed of all random choices, in place of the one in `hparams`.
        device: cpu, cuda, cuda:1, mps or auto; empty chooses.
        dtype: The folder's dtype; empty for the checkpoint's.
        max_batch_tokens: The most tokens of one batch; 0 chooses by device.
        progress: Called with a phase, the share of it that is done, and a note.

    Raises:
        UniEraseError: For any input that does not fit. It names the value, the alternatives and the remedy. No
            projection is changed then.
    """
    chosen = registry().methods.find(method) if isinstance(method, str) else method
    for name, value in (("judged", judged), ("max_batch_tokens", max_batch_tokens)):
        Range(0).check(name, value)
    requests, kept = _facts(chosen, forget, retain, allow_overlap)
    options = {
        "seed": seed,
        "mom2_dataset": corpus,
        "max_batch_tokens": max_batch_tokens or None,
        "reverse": reverse,
        **(REMOVED if remove else {}),
        **(HARDENED if harden else {}),
    }
    inputs = {
        "the model": model.folder if isinstance(model, UnlearnResult) else model,
        "the facts to forget": forget,
        "the facts to keep": retain,
        "the hyper-parameters": hparams,
        "the corpus": corpus,
        "the model that was loaded": _origin(model),
    }
    with _claimed(out, overwrite, inputs, model) as place:
        if place is not None and isinstance(model, (str, os.PathLike)):
            check_disk_space(place.path, weights_size(model, dtype))
        progress("load", 0.0, "")
        session = Session.open(
            chosen, model, tokenizer=tokenizer, hparams=hparams, options=options, device=device, dtype=dtype
        )
        progress("load", 1.0, session.loaded.name)
        if not allow_overlap:
            session.check_not_forgotten(kept)
        if place is not None and session.history is not None and session.record is None:
            raise CheckpointError(
                "The steps before this one were not written to a folder. Give out= to the first step too."
            )
        if place is not None:
            check_disk_space(place.path, model_size(session.loaded.model, session.hparams))
        run = _Unlearning(
            session=session, requests=requests, retain=kept, place=place, judged=judged, progress=progress
        )
        run.refuse_applied()
        session.tell_forgotten(requests)
        result = run.unlearn()
        if place is None:
            return result
        try:
            run.save(result, place, keep_requests)
        except BaseException:
            if result.changes.undo is not None:
                result.changes.undo()
            raise
        return replace(result, folder=place.path)


def change(
    model: Any,
    forget: Requests,
    *,
    method: str | Method[Any] = "unierase",
    tokenizer: Any,
    retain: Requests | None = None,
    allow_overlap: bool = False,
    hparams: HyperParams | str | os.PathLike[str] | None = None,
    history: History | None = None,
    told: bool = False,
    progress: Progress = lambda phase, share, note: None,
) -> tuple[Changes, History]:
    """`unlearn` on a loaded model without judging and writing, for harnesses that do both themselves.

    history   edits that earlier calls already applied to this model, as the last call returned them
    told      whether the caller has reported already which facts hold names of special tokens

    Returns the changes, and the history that includes them.
    """
    chosen = registry().methods.find(method) if isinstance(method, str) else method
    requests, kept = _facts(chosen, forget, retain, allow_overlap)
    session = Session.open(chosen, model, tokenizer=tokenizer, hparams=hparams)
    session = replace(session, history=history)
    if not allow_overlap:
        session.check_not_forgotten(kept)
    job = session.job(requests, kept, None, progress, told=told)
    with _frozen(model):
        chosen.check(job)
        changes = _changes(chosen, job)
    return changes, session.history_after(changes, requests)


def corpus_moment(
    model: Any,
    *,
    tokenizer: Any = None,
    hparams: HyperParams | str | os.PathLike[str] | None = None,
    corpus: str | None = None,
    sources: Sequence[Path] = (),
    out: Path | None = None,
    seed: int | None = None,
    device: str = "",
    dtype: str = "",
    processes: Processes | None = None,
    progress: Progress = lambda phase, share, note: None,
) -> CorpusMoment:
    """Computes only the second moment of ordinary text. A later `unlearn` with the same settings finds it in the cache.

    sources     files from which to import it instead (`statistics.files.read_moments`)
    out         file to which the first process also writes the moments
    processes   processes that share the work; each calls this with the same arguments

    The other arguments are those of `unlearn`. Raises a UniEraseError for an unfit corpus or unfit files.
    """
    progress("load", 0.0, "")
    options = {"seed": seed, "mom2_dataset": corpus}
    session = Session.open(
        UNIERASE, model, tokenizer=tokenizer, hparams=hparams, options=options, device=device, dtype=dtype
    )
    progress("load", 1.0, session.loaded.name)
    with _frozen(session.loaded.model):
        text = corpus_of(session.job((), (), None, progress))
        text.check_disk_space(out)
        found = text.take(sources) if sources else text.moment(processes)
    if out is not None and (processes is None or processes.leads):
        clear_leftovers(out)
        tensors, metadata = pack(found.moment)
        stated = dict(zip(FINGERPRINTS, (session.loaded.fingerprint, session.loaded.saved_fingerprint), strict=True))
        write_tensors(out, tensors, {**metadata, **stated, "source": json.dumps(found.source)})
    progress("statistics", 1.0, "")
    return found


@contextmanager
def _claimed(
    out: str | os.PathLike[str] | None, overwrite: bool, inputs: Mapping[str, Any], model: Any
) -> Iterator[files.OutputFolder | None]:
    """The output folder, for this run alone; None if nothing is to be written."""
    if out is None:
        yield None
        return
    before = model.folder if isinstance(model, UnlearnResult) else model
    going_on = before if isinstance(before, (str, os.PathLike)) else None
    with files.output_folder(out, overwrite, inputs=inputs, going_on=going_on) as place:
        yield place


def _origin(model: Any) -> str | None:
    """The folder or hub id from which a loaded model came."""
    loaded = model.model if isinstance(model, UnlearnResult) else model
    name = getattr(getattr(loaded, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _facts(
    method: Method[Any], forget: Requests, retain: Requests | None, allow_overlap: bool
) -> tuple[tuple[ForgetRequest, ...], tuple[ForgetRequest, ...]]:
    requests = check_requests(read_requests(forget, registry().readers))
    kept = () if retain is None else tuple(read_requests(retain, registry().readers))
    if not allow_overlap:
        check_overlap(requests, kept)
    if method.needs_subjects:
        requests = with_subjects(requests)
    return requests, kept


class _Unlearning(Phases):
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
        with _frozen(self.model):
            self.method.check(job)
            self._check_fit()
            with self.timed("evaluate"):
                before, perplexity_before = self._measured("before", "model")
            start = time.perf_counter()
            changes = _changes(self.method, job)
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
        ]

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


def _changes(method: Method[Any], job: Job[Any]) -> Changes:
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
def _frozen(model: Any) -> Iterator[None]:
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
