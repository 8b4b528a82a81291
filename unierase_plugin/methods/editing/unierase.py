"""UniErase (Yu et al. 2025, arXiv 2505.15674) as a method. The package's other modules hold its stages."""

from __future__ import annotations

from typing import Any

from ...hparams import UniEraseHyperParams
from ..contract import Changes, Job, Method


def _run(job: Job[UniEraseHyperParams]) -> Changes:
    from .engine import edit
    from .goals import GOALS

    return edit(job, GOALS["token"])


def _check(job: Job[UniEraseHyperParams]) -> None:
    from .engine import check_edit
    from .goals import GOALS

    check_edit(job, GOALS["token"])


def _settle(model: Any, hparams: UniEraseHyperParams) -> UniEraseHyperParams:
    from .layers import settle_layers

    return settle_layers(model, hparams)


UNIERASE = Method(
    name="unierase",
    title='a learned token before "I don\'t know", and a closed-form edit that makes answers begin with it',
    paper="Yu et al. 2025, arXiv 2505.15674",
    hparams=UniEraseHyperParams,
    run=_run,
    check=_check,
    settle=_settle,
    needs_subjects=True,
)
