"""Teaches a model facts: the target models that unlearning starts from, and the references that never saw some facts.

It is the training that the fine-tuning baselines have, with the likelihood of the answers as its only term.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import checkpoint as files
from .evaluation.answers import OF_FINETUNING, gives_answer
from .facts.readers import Requests, read_requests
from .facts.request import ForgetRequest
from .hparams import HyperParams
from .methods.contract import Changes, Job, Method, Progress
from .methods.finetuning.settings import FineTuneHyperParams
from .methods.finetuning.terms import TERMS
from .methods.finetuning.training import check_trainable, train
from .models.disk_space import weights_size
from .models.generate import answers
from .models.literal import text_ids
from .models.memory import peak_memory_bytes
from .models.prompts import has_chat_template
from .models.stored_dtype import round_to_stored
from .plugins.registration import registry
from .session import Session, choose_hparams
from .settings.ranges import Range
from .storage.atomic import check_disk_space
from .storage.fingerprints import CACHE_VERSION, digest, plain

logger = logging.getLogger(__name__)

#: Tokens of one batch.
CPU_TOKENS, GPU_TOKENS = 2048, 32768
#: What is written beside the model.
NOTES = "finetune.json"


@dataclass(frozen=True)
class FineTuned:
    """What a training left."""

    folder: Path
    facts: int
    #: Of the facts that were asked, those whose answer was generated.
    asked: int
    answered: int
    #: Mean negative log-likelihood a token of the answers, nats, by optimiser step.
    loss: tuple[float, ...]
    seconds: Mapping[str, float]
    peak_memory_bytes: int


def finetune(
    model: str | os.PathLike[str],
    facts: Requests,
    out: str | os.PathLike[str],
    *,
    hparams: HyperParams | str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    asked: int = 400,
    device: str = "",
    dtype: str = "",
    progress: Progress = lambda phase, share, note: None,
) -> FineTuned:
    """Trains a model on facts, asks them, and writes a plain folder with `finetune.json`, a record of the training.

    A run that was killed goes on from its last checkpoint.

    Args:
        model: A folder or a hub id.
        facts: A SPEC, or ForgetRequests, or mappings with question and answer.
        out: The output folder.
        hparams: An object, a YAML file, or a shipped file's stem.
        options: Hyper-parameters by name; they win over the file's.
        overwrite: Whether what an earlier run wrote to `out` may be replaced.
        asked: How many facts are asked afterwards, at most.
        device: cpu, cuda, cuda:1, mps or auto; empty chooses.
        dtype: The folder's dtype; empty for the checkpoint's.
        progress: Called with a phase, the share of it that is done, and a note.

    Raises:
        UniEraseError: Names the value and the remedy.
    """
    Range(0).check("asked", asked)
    requests = tuple(read_requests(facts, registry().readers))
    inputs = {"the model": model, "the facts": facts, "the hyper-parameters": hparams}
    with files.output_folder(out, overwrite, inputs=inputs) as place:
        folder = place.path
        settings = choose_hparams(hparams, os.fspath(model), FineTuneHyperParams).replace(**(options or {}))
        if files.is_edited(model):
            logger.warning(
                "%s has the record of an edit, and what is trained from it has none: keep the folder, since revert, "
                "export and a further step go on from there alone.",
                os.fspath(model),
            )
        check_disk_space(folder, weights_size(model, dtype))
        progress("load", 0.0, os.fspath(model))
        session = Session.open(_LEARNING, os.fspath(model), hparams=settings, device=device, dtype=dtype, anew=True)
        progress("load", 1.0, os.fspath(model))
        job = _job(session, requests, folder, progress)
        _LEARNING.check(job)
        job.model.requires_grad_(False)
        changes = _learn(job)
        job.model.eval()
        round_to_stored(job.model)
        done = _judged(job, requests[:asked], changes, folder)
        progress("save", 0.0, str(folder))
        notes = {"model": job.name, "hparams": settings.as_dict(), "fingerprint_before": job.fingerprint, **vars(done)}
        about = {NOTES: json.dumps(plain(notes), indent=2) + "\n"}
        files.save_plain(place, job.model, job.tokenizer, about, models=[job.name])
        files.discard_work(folder)
        progress("save", 1.0, str(folder))
    return done


def _learn(job: Job[Any]) -> Changes:
    return train(job, TERMS["learn"], None)


#: Opened and checked like a method, though nothing is forgotten.
_LEARNING = Method(
    name="finetune",
    title="The model learns facts.",
    paper="plain fine-tuning",
    hparams=FineTuneHyperParams,
    run=_learn,
    check=lambda job: check_trainable(job, TERMS["learn"], None),
)


def _job(session: Session, requests: tuple[ForgetRequest, ...], folder: Path, progress: Progress) -> Job[Any]:
    loaded, settings = session.loaded, session.hparams
    # The batches of a training are part of its result, so that they do not follow the memory that is free.
    tokens = settings.max_batch_tokens or (CPU_TOKENS if loaded.model.device.type == "cpu" else GPU_TOKENS)
    session = replace(session, loaded=replace(loaded, max_tokens=tokens))
    facts = [[request.question, request.answer] for request in requests]
    key = digest(CACHE_VERSION, "finetune", loaded.fingerprint, settings.as_dict(), facts)[:32]
    return session.job(requests, (), files.work_folder(folder, key).root, progress)


def _judged(job: Job[Any], facts: tuple[ForgetRequest, ...], changes: Changes, folder: Path) -> FineTuned:
    form = job.hparams.prompt_forms[0] if has_chat_template(job.tokenizer) else "plain"
    room = OF_FINETUNING.tokens(len(text_ids(job.tokenizer, fact.answer)) for fact in facts)
    said = (
        []
        if not facts
        else answers(
            job.model,
            job.tokenizer,
            [fact.question for fact in facts],
            form=form,
            template_kwargs=job.hparams.chat_template_kwargs,
            max_new_tokens=room,
            max_tokens=2 * job.max_tokens,
            progress=lambda share: job.progress("after", share, f"{len(facts)} answers"),
        )
    )
    right = sum(gives_answer(fact, text) for fact, text in zip(facts, said, strict=True))
    return FineTuned(
        folder=folder,
        facts=len(job.requests),
        asked=len(facts),
        answered=right,
        loss=tuple(changes.figures["loss"]),
        seconds=dict(changes.seconds),
        peak_memory_bytes=peak_memory_bytes(),
    )
