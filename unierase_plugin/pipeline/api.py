"""The whole job as one call: `unlearn`, and its parts for harnesses (`change`) and for statistics (`corpus_moment`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import checkpoint as files
from ..errors import CheckpointError
from ..facts.readers import Requests, read_requests
from ..facts.request import ForgetRequest, check_overlap, check_requests, with_subjects
from ..hparams import HARDENED, REMOVED, HyperParams
from ..methods.contract import Changes, History, Method, Progress
from ..methods.editing.engine import corpus_of
from ..methods.editing.unierase import UNIERASE
from ..models.disk_space import model_size, weights_size
from ..plugins.registration import registry
from ..results import UnlearnResult
from ..session import Session
from ..settings.ranges import Range
from ..statistics.collection import CorpusMoment
from ..statistics.distributed import Processes
from ..statistics.files import FINGERPRINTS
from ..storage.atomic import check_disk_space, clear_leftovers
from ..storage.tensor_files import pack, write_tensors
from .run import UnlearningRun, changes_of, frozen


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
        run = UnlearningRun(
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
    with frozen(model):
        chosen.check(job)
        changes = changes_of(chosen, job)
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
    with frozen(session.loaded.model):
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
