"""Removal as its own method: without a token and without a replacement answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...hparams import RemovalSettings
from ..contract import Changes, Job, Method


@dataclass(frozen=True)
class RemovalHyperParams(RemovalSettings):
    """A removal's settings. Neighbours are kept by default."""

    folder: ClassVar[str] = "Removal"
    retain_neighbours: int = 6


# Imports that need torch are inside the functions, so that listing the methods is quick.


def _run(job: Job[RemovalHyperParams]) -> Changes:
    from .job import remove_alone

    return remove_alone(job)


def _check(job: Job[RemovalHyperParams]) -> None:
    from .job import check_removal

    check_removal(job)


def _settle(model: Any, hparams: RemovalHyperParams) -> RemovalHyperParams:
    from ...models.architecture import find_architecture
    from ...models.served import check_served
    from .job import settle_removal

    arch = find_architecture(model, hparams.rewrite_module_tmp, hparams.layer_module_tmp)
    check_served(arch)
    return settle_removal(arch, hparams)


REMOVAL: Method[RemovalHyperParams] = Method(
    name="removal",
    title="takes the model's knowledge of the facts out of its MLPs: a teacher in closed form, distilled back",
    paper="this package; K-FAC after Martens and Grosse 2015, arXiv 1503.05671",
    hparams=RemovalHyperParams,
    run=_run,
    check=_check,
    settle=_settle,
)
