"""A job of a method, as a session makes it, without opening one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from unierase_plugin.methods.contract import Job
from unierase_plugin.models.loaded import LoadedModel


def job_of(
    model: Any, tokenizer: Any, requests: Any, retain: Any, hparams: Any, *, work: Path | None = None
) -> Job[Any]:
    """A job on a tiny model whose fingerprints nothing asks for."""
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name="tiny",
        max_tokens=2048,
        fingerprint="",
        saved_fingerprint="",
        tokenizer_fingerprint="",
    )
    return Job(
        loaded=loaded,
        requests=requests,
        retain=retain,
        hparams=hparams,
        work=work,
        history=None,
        progress=lambda phase, share, note: None,
    )


def with_room(job: Job[Any], tokens: int) -> Job[Any]:
    """The job on a device that has room for so many tokens at a time."""
    return replace(job, loaded=replace(job.loaded, max_tokens=tokens))
