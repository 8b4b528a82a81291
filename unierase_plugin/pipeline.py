"""The whole of a run on one page: requests in, model judged, changed by a method, judged again, folder written.

Every phase that takes long is kept when it ends, so that a run that was killed goes on where it was: token and
statistics in the user's cache, since other runs want them too; answers, values and the edit beside the output folder.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint as files
from .errors import CheckpointError, EditError, HyperParamsError, RequestError, StepAppliedError, UniEraseError
from .evaluation.report import Outcome, Report, judge
from .facts.readers import read_requests
from .facts.request import (
    ForgetRequest,
    check_not_forgotten,
    check_overlap,
    check_requests,
    one_spelling,
    with_subjects,
)
from .facts.resources import lines, paragraphs
from .hparams import HARDENED, PROMPT_FORMS, REMOVED, HyperParams, UniEraseHyperParams
from .locate_then_edit.edit import WeightEdit
from .methods.contract import Changes, Earlier, Job, Method, Progress
from .methods.editing.engine import corpus_of
from .methods.editing.unierase import UNIERASE
from .models.architecture import refuse_unfit
from .models.chat_templates import check_chat_template
from .models.generate import answers, context_limit, perplexity
from .models.literal import tell_special_names, text_ids
from .models.loading import check_stated_blocks, load
from .models.prompts import PLAIN_FORM, encode, has_chat_template, render
from .models.room import model_size, weights_size
from .models.stored_dtype import as_stored, round_to_stored, stored_dtype
from .plugins.registration import registry
from .settings.ranges import Range
from .settings.values import checked_seed
from .statistics.collection import CorpusMoment
from .statistics.corpus import check_corpus_file
from .statistics.distributed import Team
from .statistics.files import FINGERPRINTS
from .storage.atomic import check_room, clear_leftovers
from .storage.cache import cache_folder
from .storage.fingerprints import CACHE_VERSION, digest, model_fingerprint, tokenizer_fingerprint
from .storage.phases import Phases
from .storage.tensor_files import Packed, pack, write_tensors
from .unlearning_token import UnlearningToken

logger = logging.getLogger(__name__)

#: Tokens of a batch on a CPU, and at most on a GPU.
CPU_TOKENS, GPU_TOKENS_MOST = 2048, 65536
#: Tokens generated for a judged answer, beyond the longest answer asked for.
ANSWER_ROOM, ANSWER_LEAST, ANSWER_MOST = 8, 32, 128

Requests = str | os.PathLike[str] | Iterable[ForgetRequest | Mapping[str, Any]]


@dataclass(frozen=True)
class UnlearnResult:
    """What a run leaves: the changed model in memory, the change as data, and what was measured."""

    model: Any
    tokenizer: Any
    method: str
    requests: tuple[ForgetRequest, ...]
    hparams: Any
    report: Report
    folder: Path | None
    changes: Changes = field(repr=False)
    #: This step and those before it: what a later one goes on from.
    history: Earlier = field(repr=False)

    @property
    def token(self) -> UnlearningToken | None:
        """The unlearning token, where the method has one."""
        return self.changes.token

    @property
    def edit(self) -> WeightEdit | None:
        """The edit as low-rank factors, where the method has it as data."""
        return self.changes.edit

    def revert(self) -> None:
        """Model and tokenizer as they were before this step, to the bit; a token that came with it goes.

        Raises EditError for a method that trains the whole model and keeps no copy.
        """
        if self.changes.undo is None:
            raise EditError(f"What {self.method!r} did cannot be taken back in memory. Load the model again.")
        self.changes.undo()


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
    """Makes a model forget given facts; by UniErase it answers with the unlearning token and "I don't know".

    method    name of a registered method, see `unierase methods`, or a Method
    model     folder, hub id, a loaded causal LM (then give `tokenizer` too; it is edited in place), or the result of an
              earlier call, from which this one goes on; so it does from a folder that was edited before
    forget    a SPEC, or an iterable of ForgetRequest or mappings with question, answer and optionally subject
    retain    the same for facts to be kept: the method protects them (UniErase: by their keys), and they are judged
    allow_overlap  whether a fact to keep may be one to forget too, or one that an earlier step forgot: it is then
              pulled both ways, as given
    hparams   an object, a YAML file, a shipped file's stem; without it the shipped file for this model, else defaults
    corpus    text for the second moment, where the method takes one: "self", a text file, or a hub dataset as
              name[:config[:column]]
    harden    whether the edit is to withstand attacks, in the ways that earned it (docs/hardening.md): sets
              `hparams.HARDENED`, whatever hparams says; UniErase's setting `harden` names single ways
    remove    whether what the model knows of the facts is removed, and what it says instead learned after that
              (docs/removal.md): sets `hparams.REMOVED`, whatever hparams says, of which the setting `remove` is one;
              the method "removal" does the first alone
    reverse   whether the way back from the answer to the subject is forgotten too; the hparams' when left out
    out       output folder; without it nothing is written but the caches
    judged    how many facts of each set are answered before and after, since generating takes time

    Raises a UniEraseError that names the value, the alternatives and the remedy; no projection is then changed.
    """
    chosen = registry().methods.find(method) if isinstance(method, str) else method
    for name, value in (("judged", judged), ("max_batch_tokens", max_batch_tokens)):
        Range(0).check(name, value)
    requests, kept = _facts(chosen, forget, retain, allow_overlap)
    options = {
        "seed": seed, "mom2_dataset": corpus, "max_batch_tokens": max_batch_tokens or None, "reverse": reverse,
        **(REMOVED if remove else {}), **(HARDENED if harden else {}),
    }  # fmt: skip
    inputs = {
        "the model": model.folder if isinstance(model, UnlearnResult) else model, "the facts to forget": forget,
        "the facts to keep": retain, "the hyper-parameters": hparams, "the corpus": corpus,
        "the model that was loaded": _origin(model),
    }  # fmt: skip
    with _claimed(out, overwrite, inputs, model) as place:
        if place is not None and isinstance(model, (str, os.PathLike)):
            check_room(place.path, weights_size(model, dtype))
        progress("load", 0.0, "")
        subject = _Subject.open(chosen, model, tokenizer, hparams, options, device, dtype)
        progress("load", 1.0, subject.name)
        if not allow_overlap:
            subject.check_not_forgotten(kept)
        if place is not None and subject.earlier is not None and subject.record is None:
            raise CheckpointError(
                "The steps before this one were not written to a folder: give out= to the first one too."
            )
        if place is not None:
            check_room(place.path, model_size(subject.model, subject.hparams))
        run = _Run(subject, requests, kept, place, judged, progress)
        run.refuse_applied()
        subject.tell_forgotten(requests)
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
    earlier: Earlier | None = None,
    told: bool = False,
    progress: Progress = lambda phase, share, note: None,
) -> tuple[Changes, Earlier]:
    """`unlearn` on a loaded model without judging and writing, for harnesses that do both themselves.

    earlier   the steps that the model has behind it, as the call before returned them
    told      the caller has said which facts have names of special tokens in their texts

    Returns what was done, and the steps with this one.
    """
    chosen = registry().methods.find(method) if isinstance(method, str) else method
    requests, kept = _facts(chosen, forget, retain, allow_overlap)
    subject = _Subject.open(chosen, model, tokenizer, hparams, {}, "", "")
    subject = replace(subject, earlier=earlier)
    if not allow_overlap:
        subject.check_not_forgotten(kept)
    job = subject.job(requests, kept, None, progress, told)
    with _frozen(model):
        chosen.check(job)
        changes = chosen.run(job) or Changes()
    return changes, subject.history(changes, requests)


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
    team: Team | None = None,
    progress: Progress = lambda phase, share, note: None,
) -> CorpusMoment:
    """The second moment of ordinary text alone, left where a later `unlearn` with the same settings finds it.

    sources   files to import it from instead (`moment_files.read_moments`)
    out       file that the moments are written to as well, by the first process
    team      processes that share the work; each calls this with the same arguments
    The rest is as for `unlearn`. Raises a UniEraseError for a corpus or files that do not do.
    """
    progress("load", 0.0, "")
    options = {"seed": seed, "mom2_dataset": corpus}
    subject = _Subject.open(UNIERASE, model, tokenizer, hparams, options, device, dtype)
    progress("load", 1.0, subject.name)
    with _frozen(subject.model):
        text = corpus_of(subject.job((), (), None, progress))
        text.check_room(out)
        found = text.take(sources, subject.saved_fingerprint) if sources else text.moment(team)
    if out is not None and (team is None or team.leads):
        clear_leftovers(out)
        tensors, metadata = pack(found.moment)
        stated = dict(zip(FINGERPRINTS, (subject.fingerprint, subject.saved_fingerprint), strict=True))
        write_tensors(out, tensors, {**metadata, **stated, "source": json.dumps(found.source)})
    progress("statistics", 1.0, "")
    return found


@contextmanager
def _claimed(
    out: str | os.PathLike[str] | None, overwrite: bool, inputs: Mapping[str, Any], model: Any
) -> Iterator[files.OutputFolder | None]:
    """The output folder, for this run alone; None where nothing is to be written."""
    if out is None:
        yield None
        return
    before = model.folder if isinstance(model, UnlearnResult) else model
    going_on = before if isinstance(before, (str, os.PathLike)) else None
    with files.output_folder(out, overwrite, inputs=inputs, going_on=going_on) as place:
        yield place


def _origin(model: Any) -> str | None:
    """Where a model at hand was loaded from."""
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


@dataclass(frozen=True)
class _Subject:
    """What a run works on: a model at hand, the method's settings for it, and the steps that it has behind it."""

    method: Method[Any]
    model: Any
    tokenizer: Any
    name: str
    hparams: HyperParams
    seed: int
    max_tokens: int
    fingerprint: str
    #: Of the weights as they would be written (`stored`).
    saved_fingerprint: str
    words: str
    record: files.Checkpoint | None
    earlier: Earlier | None

    @classmethod
    def open(
        cls, method: Method[Any], model: Any, tokenizer: Any, hparams: HyperParams | str | os.PathLike[str] | None,
        options: Mapping[str, Any], device: str, dtype: str,
    ) -> _Subject:  # fmt: skip
        """options: settings by name that win over the hyper-parameters' where they are not None."""
        seed = options.get("seed")
        checked_seed(seed or 0)
        record, earlier = None, None
        if isinstance(model, UnlearnResult):
            _check_same_method(model, method)
            record = None if model.folder is None else files.examine(model.folder).up_to()
            hparams = model.hparams if hparams is None else hparams
            model, tokenizer, earlier = model.model, model.tokenizer, model.history
        if isinstance(model, (str, os.PathLike)):
            name = os.fspath(model)
            settings = _with_options(choose_hparams(hparams, name, method.hparams), options, method)
            _check_places(settings)
            record = _earlier_record(name, method)
            check_stated_blocks(name, settings)
            model, tokenizer = load(name, device or getattr(settings, "device", ""), dtype)
            earlier = _steps_of(record)
        else:
            _check_loaded(model, tokenizer, device or dtype)
            name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
            settings = _with_options(choose_hparams(hparams, name, method.hparams), options, method)
        settings = method.settle(model, settings)
        _tell_form(name, tokenizer, settings)
        check_chat_template(tokenizer, getattr(settings, "chat_template_kwargs", None))
        fingerprint = model_fingerprint(model)
        with as_stored(model):
            saved = fingerprint if stored_dtype(model) is None else model_fingerprint(model)
        _check_unchanged(saved, record, name)
        room = options.get("max_batch_tokens") or getattr(settings, "max_batch_tokens", 0)
        return cls(
            method, model, tokenizer, name, settings, getattr(settings, "seed", 0) if seed is None else seed,
            room or fitting_tokens(model), fingerprint, saved, tokenizer_fingerprint(tokenizer),
            record, earlier,
        )  # fmt: skip

    def job(
        self, requests: tuple[ForgetRequest, ...], retain: tuple[ForgetRequest, ...], work: Path | None,
        progress: Progress, told: bool = False,
    ) -> Job[Any]:  # fmt: skip
        if not told:
            tell_special_names(self.tokenizer, (*requests, *retain), [getattr(self.hparams, "unlearning_token", "")])
        return Job(
            self.model, self.tokenizer, self.name, requests, retain, self.hparams, self.seed, self.max_tokens,
            self.fingerprint, self.words, work, self.earlier, progress,
        )  # fmt: skip

    def history(self, changes: Changes, requests: Sequence[ForgetRequest]) -> Earlier:
        before = self.earlier or Earlier(None, (), self.fingerprint, self.words)
        return before.after(changes, requests)

    def forgotten(self, facts: Sequence[ForgetRequest]) -> list[int]:
        """The numbers of those facts that an earlier step forgot."""
        in_memory = self.earlier.questions if self.earlier else frozenset[str]()
        found = {index for index, fact in enumerate(facts) if one_spelling(fact.question) in in_memory}
        if self.record is not None:
            found.update(self.record.forgotten(fact.question for fact in facts))
        return sorted(found)

    def check_not_forgotten(self, retain: Sequence[ForgetRequest]) -> None:
        check_not_forgotten(retain, self.forgotten(retain), self.name)

    def tell_forgotten(self, requests: Sequence[ForgetRequest]) -> None:
        again = self.forgotten(requests)
        if again:
            logger.warning(
                "%d of %d facts to forget were forgotten in an earlier step already, %s for one. They are forgotten "
                "again.", len(again), len(requests), requests[again[0]].label,
            )  # fmt: skip


class _Run(Phases):
    """One run of any method: the model loaded, asked before and after, and the folder written."""

    def __init__(
        self, subject: _Subject, requests: tuple[ForgetRequest, ...], retain: tuple[ForgetRequest, ...],
        place: files.OutputFolder | None, judged: int, progress: Progress,
    ) -> None:  # fmt: skip
        hparams = subject.hparams
        key = digest(
            CACHE_VERSION, subject.method.name, subject.fingerprint, subject.words, hparams.as_dict(), subject.seed,
            _plain(requests), _plain(retain), [judged],
        )[:32]  # fmt: skip
        super().__init__(files.work_folder(place.path, key).root if place else None)
        self.place = place
        self.subject, self.method = subject, subject.method
        self.model, self.tokenizer = subject.model, subject.tokenizer
        self.job = subject.job(requests, retain, self.work.root if self.work else None, progress)
        self.secret = digest("answers", _plain(requests), _plain(retain))
        self.judged, self.judged_forget = (*requests[:judged], *retain[:judged]), len(requests[:judged])
        form = getattr(hparams, "prompt_forms", PROMPT_FORMS)[0]
        self.form = "plain" if form == "chat" and not has_chat_template(self.tokenizer) else form
        self.template_kwargs: dict[str, Any] = getattr(hparams, "chat_template_kwargs", {})

    def unlearn(self) -> UnlearnResult:
        job = self.job
        with _frozen(self.model):
            self.method.check(job)
            self._check_fit()
            with self.timed("evaluate"):
                before, perplexity_before = self._measured("before", "model")
            start = time.perf_counter()
            changes = self.method.run(job) or Changes()
            round_to_stored(self.model)
            spent = changes.seconds or {self.method.name: time.perf_counter() - start}
            self.model.eval()
            try:
                with self.timed("evaluate"):
                    key = model_fingerprint(self.model) if self.work else ""
                    after, perplexity_after = self._measured("after", key)
                if not math.isfinite(perplexity_after):
                    logger.warning(
                        "The edited model gives NaN or infinity on ordinary text: the edit damaged it. Take it back."
                    )
                outcomes = self._judged(before, after)
            except BaseException:
                if changes.undo is not None:
                    changes.undo()
                raise
            total = sum(parameter.numel() for parameter in self.model.parameters())
            report = Report(
                job.name, self.method.name, outcomes[: self.judged_forget], outcomes[self.judged_forget :],
                perplexity_before, perplexity_after, changes.token_leak,
                changes.edit.norm_ratios if changes.edit else {},
                (total if changes.parameters is None else changes.parameters) / total, {**spent, **self.seconds},
                peak_memory_bytes(), changes.figures,
            )  # fmt: skip
        return UnlearnResult(
            self.model, self.tokenizer, self.method.name, job.requests, job.hparams, report, None, changes,
            self.subject.history(changes, job.requests),
        )  # fmt: skip

    def refuse_applied(self) -> None:
        """StepAppliedError where the folder's last step is this one: the run was stopped after it had been written."""
        record = self.subject.record
        if self.place is None or not self.place.in_place or record is None or len(record.manifest["steps"]) < 2:
            return
        before, last = record.manifest["steps"][-2:]
        inputs = self._step_inputs(before["model_fingerprint_after"])
        if last.get("id") == files.step_id(record.manifest["salt"], inputs):
            files.discard_work(self.place.path)
            raise StepAppliedError(
                f"{str(self.place.path)!r} has this step already: step {len(record.manifest['steps'])}, of "
                f"{last['created']}, was made from the same requests with the same settings. Nothing was changed. Give "
                "another --seed to apply it once more."
            )

    def _step_inputs(self, fingerprint: str) -> list[Any]:
        """What the step is made of; `fingerprint` is that of the weights before it."""
        job, in_place = self.job, self.place is not None and self.place.in_place
        return [
            self.method.name, fingerprint, in_place, job.hparams.as_dict(), job.seed, _plain(job.requests),
            _plain(job.retain),
        ]  # fmt: skip

    def save(self, result: UnlearnResult, place: files.OutputFolder, keep_requests: bool) -> None:
        job, changes, folder = self.job, result.changes, place.path
        job.progress("save", 0.0, str(folder))
        settings = job.hparams.as_dict()
        files.save_checkpoint(
            place, model=result.model, tokenizer=result.tokenizer, token=changes.token, edit=changes.edit,
            originals=changes.originals, requests=job.requests,
            # A seed belongs into the record also where the method's settings have none.
            hparams=job.hparams if "seed" in settings else {**settings, "seed": job.seed},
            manifest_extra={
                "method": self.method.name, "model": job.name,
                "model_fingerprint_before": self.subject.saved_fingerprint,
                "working_fingerprint_before": job.fingerprint,
                "tokenizer_fingerprint_before": self.subject.words,
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            },
            report=result.report.as_dict(), keep_requests=keep_requests, earlier=self.subject.record,
            step_inputs=self._step_inputs(self.subject.saved_fingerprint),
        )  # fmt: skip
        files.discard_work(folder)
        job.progress("save", 1.0, str(folder))

    def _check_fit(self) -> None:
        """RequestError for a fact that the model's context cannot hold, before anything takes time."""
        context, room = context_limit(self.model), self._answer_room()
        for fact in self.judged:
            text = render(self.tokenizer, fact.question, self.form, self.template_kwargs)
            needed = len(encode(self.tokenizer, text, self.form)) + room
            if needed > context:
                raise RequestError(
                    f"The question of {fact.label} needs {needed} tokens with its answer; "
                    f"the model's context holds {context}. Shorten it, or leave it out."
                )

    def _measured(self, phase: str, key: str) -> tuple[list[str], float]:
        """Answers to the judged facts and perplexity of ordinary text, by the model as it is now."""

        def measure() -> Packed:
            level = perplexity(self.model, self.tokenizer, paragraphs("ordinary_text"))
            if phase == "before" and not math.isfinite(level):
                raise UniEraseError(_why_not_finite(self.job.name, self.model))
            return {}, {"answers": files.seal(json.dumps(self._answers(phase)), self.secret), "perplexity": repr(level)}

        metadata = self.resumed(phase, key, measure)[1]
        return json.loads(files.unseal(metadata["answers"], self.secret)), float(metadata["perplexity"])

    def _answers(self, phase: str) -> list[str]:
        if not self.judged:
            return []
        return answers(
            self.model, self.tokenizer, [fact.question for fact in self.judged],
            form=self.form, template_kwargs=self.template_kwargs,
            max_new_tokens=self._answer_room(), max_tokens=2 * self.job.max_tokens,
            progress=lambda share: self.job.progress(phase, share, f"{len(self.judged)} answers"),
        )  # fmt: skip

    def _answer_room(self) -> int:
        """Tokens generated for a judged answer."""
        sizes = [len(text_ids(self.tokenizer, fact.answer)) for fact in self.judged]
        return min(max(max(sizes, default=0) + ANSWER_ROOM, ANSWER_LEAST), ANSWER_MOST)

    def _judged(self, before: Sequence[str], after: Sequence[str]) -> list[Outcome]:
        ends = [text for text in (self.tokenizer.eos_token, self.tokenizer.pad_token) if text]
        # Where a method has no token, no answer begins with it.
        token = getattr(self.job.hparams, "unlearning_token", UniEraseHyperParams.unlearning_token)
        return [
            judge(fact.question, fact.answer, old, new, token, ends, lines("idk_phrases"))
            for fact, old, new in zip(self.judged, before, after, strict=True)
        ]


def choose_hparams(
    given: HyperParams | str | os.PathLike[str] | None, model: str, kind: type[HyperParams] = UniEraseHyperParams
) -> HyperParams:
    """The hyper-parameters given; else the shipped file whose model_name is this model's; else the defaults of `kind`.

    Raises HyperParamsError for an object of another kind, and for a file that does not fit.
    """
    if isinstance(given, HyperParams):
        if not isinstance(given, kind):
            raise HyperParamsError(f"This method takes {kind.__name__}, not {type(given).__name__}.")
        return given
    return kind.for_model(model) if given is None else kind.from_hparams(os.fspath(given))


def fitting_tokens(model: Any) -> int:
    """Tokens of a batch that a pass with gradients through all blocks is likely to have room for.

    On a GPU, from what is free on the fullest device; where the estimate is too bold, batches are halved. On a CPU
    longer batches are no faster.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if not devices:
        return CPU_TOKENS
    config = model.config.get_text_config()
    # What a block keeps for its backward pass: attention and norms in units of the hidden size, the MLP of its width.
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    kept = config.num_hidden_layers * (12 * config.hidden_size + 4 * wide) * model.dtype.itemsize / len(devices)
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    return max(CPU_TOKENS, min(int(free / 2 / kept), GPU_TOKENS_MOST))


def peak_memory_bytes() -> int:
    """The GPU's peak allocation where there is one, else the process' peak resident size."""
    if torch.cuda.is_available():
        return int(sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())))
    import resource

    # macOS counts in bytes, Linux in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _with_options(hparams: HyperParams, options: Mapping[str, Any], method: Method[Any]) -> HyperParams:
    """Options in the place of settings of their name; the seed and the size of a batch need not be settings."""
    known = hparams.as_dict()
    if options.get("mom2_dataset") is not None and "mom2_dataset" not in known:
        raise HyperParamsError(f"The method {method.name!r} reads no corpus. Leave corpus (--corpus) out.")
    if options.get("harden") is not None and "harden" not in known:
        raise HyperParamsError(f"The method {method.name!r} cannot be hardened; UniErase can. Leave --harden out.")
    if options.get("remove") is not None and "remove" not in known:
        raise HyperParamsError(
            f"The method {method.name!r} cannot be joined with a removal; UniErase, rome, memit and alphaedit can, and "
            "--method removal is one alone. Leave --remove out."
        )
    if options.get("reverse") and "reverse" not in known:
        raise HyperParamsError(f"The method {method.name!r} has no reverse; those that edit have. Leave --reverse out.")
    return hparams.replace(**{name: value for name, value in options.items() if value is not None and name in known})


def _check_places(settings: HyperParams) -> None:
    """Raises a UniEraseError for a cache or a corpus that cannot be used, before the model is loaded."""
    if hasattr(settings, "stats_dir"):
        cache_folder(settings.stats_dir)
    if hasattr(settings, "mom2_dataset"):
        check_corpus_file(settings.mom2_dataset, getattr(settings, "mom2_n_samples", 1))


def _earlier_record(name: str, method: Method[Any]) -> files.Checkpoint | None:
    """The record of a folder that was edited before, whose steps this run goes on from."""
    if not files.is_edited(name):
        return None
    found = files.examine(name).up_to()
    if found.manifest["method"] != method.name:
        raise CheckpointError(
            f"{name!r} was made by another method; start from its base model {found.manifest['model']!r}."
        )
    return found


def _check_same_method(result: UnlearnResult, method: Method[Any]) -> None:
    if result.method != method.name:
        raise CheckpointError(f"The model was changed by {result.method!r}; {method.name!r} cannot go on from there.")


def _steps_of(record: files.Checkpoint | None) -> Earlier | None:
    if record is None:
        return None
    first = record.manifest
    return Earlier(
        record.token,
        record.edits,
        first.get("working_fingerprint_before") or first["model_fingerprint_before"],
        first.get("tokenizer_fingerprint_before", ""),
    )


def _check_loaded(model: Any, tokenizer: Any, placement: str) -> None:
    if tokenizer is None:
        raise UniEraseError("A loaded model needs its tokenizer: unlearn(model, forget, tokenizer=tokenizer).")
    refuse_unfit(model)
    if placement:
        raise UniEraseError("device and dtype are for models given by name; move the loaded model yourself.")


def _tell_form(name: str, tokenizer: Any, hparams: HyperParams) -> None:
    if "chat" in getattr(hparams, "prompt_forms", PROMPT_FORMS) and not has_chat_template(tokenizer):
        logger.warning(
            "%s has no chat template: questions are edited and asked as %r. A chat model needs its chat_template.",
            name, PLAIN_FORM,
        )  # fmt: skip


def _dtype_of(record: files.Checkpoint | None) -> str:
    """The dtype in which an edited folder was made: in another one, its first step could not be taken back."""
    if record is None or record.originals is None:
        return ""
    return str(next(iter(record.originals.projections.values())).dtype).removeprefix("torch.")


def _check_unchanged(fingerprint: str, record: files.Checkpoint | None, name: str) -> None:
    if record is not None and fingerprint != record.manifest["model_fingerprint_after"]:
        raise CheckpointError(
            f"The weights in {name!r} are not those that its record was written for: they were trained further, or "
            f"loaded in another dtype than {_dtype_of(record) or 'before'}. Leave dtype out, or start from the base "
            f"model {record.manifest['model']!r}."
        )


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
    """No parameter gets a gradient inside; training mode and gradients are put back after."""
    training = model.training
    # By name: room for the token makes the embedding another parameter.
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(False)  # a method may have trained what its caller had frozen
        for name in wanted:
            model.get_parameter(name).requires_grad_(True)
        model.train(training)
