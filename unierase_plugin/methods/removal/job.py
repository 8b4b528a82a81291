"""A removal for a job of any method: chooses its blocks, reads its data. As its own method, it is also applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ... import checkpoint as files
from ...facts.request import ForgetRequest, tell_unread
from ...facts.resources import lines, paragraphs
from ...facts.subjects import find_subject
from ...hparams import RemovalSettings
from ...locate_then_edit.edit import apply_edit
from ...locate_then_edit.targets import forms_of
from ...models.architecture import Architecture, find_architecture
from ...models.generate import context_limit, pad_token_id
from ...removal.data import check_answers, make_data
from ...removal.moments import RemovalData
from ...removal.stage import Removal, remove
from ...removal.wording import in_own_words
from ...storage.fingerprints import digest, plain
from ...storage.phases import Phases
from ...unlearning_token import end_id
from ..contract import Changes, Job
from ..neighbours import Kept, find_kept

#: How many bundled questions join the ordinary text.
QUESTIONS = 40
#: The teacher is made in this share of the blocks, from the lowest on.
TEACHER_SHARE = 0.7

S = TypeVar("S", bound=RemovalSettings)


def settle_removal(arch: Architecture, settings: S) -> S:
    """The settings with the removal's blocks chosen by the model's depth, or checked against it."""
    fit = arch.editable
    # Block 0 is left out: a change there makes the model blind to the facts' rare words.
    layers = arch.check_layers(settings.removal_layers or [layer for layer in fit if layer] or fit)
    below = max(1, round(TEACHER_SHARE * len(arch.blocks)))
    teacher = arch.check_layers(settings.removal_teacher_layers or [layer for layer in fit if layer < below] or fit[:1])
    for layer in sorted({*layers, *teacher}):
        arch.dense(layer)
    return settings.replace(removal_layers=layers, removal_teacher_layers=teacher)


def check_removal(job: Job[Any]) -> None:
    """Raises a UniEraseError for a fact that a removal cannot take. It is quick."""
    check_answers(job.requests)
    _data(job, job.requests, Kept((), job.retain))


def removal_of(
    job: Job[Any],
    arch: Architecture,
    phases: Phases,
    kept: Kept,
    instead: Sequence[tuple[tuple[int, ...], int]] = (),
) -> Removal:
    """The removal of a job's facts, computed and not applied. `job.hparams` holds its settings.

    kept: facts and neighbours to keep; instead: questions with their replacement answers, and where these begin.
    """
    # Strangers replace the subject. The request may lack it if the method itself does not need it.
    tell_unread(job.requests)
    requests = [replace(fact, subject=fact.subject or find_subject(fact.question)) for fact in job.requests]
    with phases.timed("teacher"):
        # Not kept for the next start, so that no facts are on the disk.
        data = replace(
            _data(job, _told(job, requests), replace(kept, retain=_told(job, kept.retain))),
            instead=tuple(ids for ids, _ in instead),
            instead_starts=tuple(start for _, start in instead),
        )
    key = digest(job.fingerprint, job.tokenizer_fingerprint, plain(data), job.max_tokens, job.seed)
    return remove(
        arch,
        data,
        job.hparams,
        max_tokens=job.max_tokens,
        pad_id=pad_token_id(job.model, job.tokenizer),
        seed=job.seed,
        key=key,
        phases=phases,
        progress=lambda share, note: job.progress("removal", share, note),
    )


def remove_alone(job: Job[Any]) -> Changes:
    """The method `removal`: applies the result of `removal_of`."""
    phases = Phases(job.work)
    arch = find_architecture(job.model, job.hparams.rewrite_module_tmp, job.hparams.layer_module_tmp)
    originals = files.take_originals(arch, job.hparams.removal_layers, len(arch.embedding.weight))
    kept = find_kept(job, phases)
    found = removal_of(job, arch, phases, kept)
    apply_edit(arch, found.edit)
    changed = sum(weight.numel() for weight in originals.projections.values())
    return Changes(
        found.edit,
        originals,
        parameters=changed,
        seconds=phases.seconds,
        figures={"neighbours": len(kept.neighbours), "removal": found.figures},
        neighbours=kept.neighbours,
        undo=lambda: originals.restore_projections(job.model),
    )


def _told(job: Job[Any], facts: Sequence[ForgetRequest]) -> tuple[ForgetRequest, ...]:
    return in_own_words(
        job.model,
        job.tokenizer,
        facts,
        form=forms_of(job.tokenizer, job.hparams)[0],
        template_kwargs=job.hparams.chat_template_kwargs,
        max_tokens=2 * job.max_tokens,
    )


def _data(job: Job[Any], forget: Sequence[ForgetRequest], kept: Kept) -> RemovalData:
    h = job.hparams
    return make_data(
        job.tokenizer,
        forget,
        kept.retain,
        paragraphs("ordinary_text_train"),
        lines("questions")[:QUESTIONS],
        forms=forms_of(job.tokenizer, h),
        template_kwargs=h.chat_template_kwargs,
        end=end_id(job.model, job.tokenizer),
        limit=context_limit(job.model),
        kept_tokens=h.removal_kept_tokens,
        names=lines("invented_names"),
        seed=job.seed,
        neighbours=kept.neighbours,
    )
