"""ROME, MEMIT and AlphaEdit on UniErase's engine, each with any target. This shows what the token itself contributes.

All methods share one engine: they optimise values and take keys in the same way. They differ in the closed form. ROME
also edits one block, for one request after another. Targets differ in how an answer shall begin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import HyperParamsError, did_you_mean, shown
from ...hparams import UniEraseHyperParams
from ..contract import Changes, Job, Method

if TYPE_CHECKING:
    from .engine import Goal

#: "I don't know" sentences, the end of text, a new token that was never trained, UniErase's learned token.
TARGETS = ("idk", "eos", "random_token", "token")


@dataclass(frozen=True)
class EditingHyperParams(UniEraseHyperParams):
    """UniErase's settings and a target. Defaults are the published values if the engine has the same quantity."""

    v_num_grad_steps: int = 25
    clamp_norm_factor: float = 0.75
    v_share_subject: bool = False
    retain_update_weight: float = 0.0
    retain_key_weight: float = 0.0
    retain_neighbours: int = 0
    context_template_length_params: tuple[tuple[int, int], ...] = ((10, 5),)
    #: How answers shall begin: idk, eos, random_token or token.
    target: str = "idk"

    def validate(self) -> None:
        super().validate()
        if self.target not in TARGETS:
            raise HyperParamsError(
                f"target = {shown(self.target)} must be one of: "
                f"{', '.join(TARGETS)}.{did_you_mean(self.target, TARGETS)}"
            )


@dataclass(frozen=True)
class ROMEHyperParams(EditingHyperParams):
    """Meng et al. 2022 (arXiv 2202.05262), with its authors' settings for GPT-J."""

    folder: ClassVar[str] = "ROME"
    alg_name: str = "ROME"
    solver: str = "exact"
    v_num_grad_steps: int = 20
    clamp_norm_factor: float = 4.0
    context_template_length_params: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))


@dataclass(frozen=True)
class MEMITHyperParams(EditingHyperParams):
    """Meng et al. 2023 (arXiv 2210.07229), with its authors' settings for GPT-J."""

    folder: ClassVar[str] = "MEMIT"
    alg_name: str = "MEMIT"
    solver: str = "ridge"
    mom2_update_weight: float = 15000.0


@dataclass(frozen=True)
class AlphaEditHyperParams(EditingHyperParams):
    """Fang et al. 2024 (arXiv 2410.02355), with its authors' settings for Llama-3-8B."""

    folder: ClassVar[str] = "AlphaEdit"
    alg_name: str = "AlphaEdit"
    solver: str = "null_space"


# Imports that need torch are inside the functions, so that listing the methods is quick.


def _goal(job: Job[Any]) -> Goal:
    from .goals import GOALS

    return replace(GOALS[job.hparams.target], one_by_one=isinstance(job.hparams, ROMEHyperParams))


def _run(job: Job[Any]) -> Changes:
    from .engine import edit

    return edit(job, _goal(job))


def _check(job: Job[Any]) -> None:
    from .engine import check_edit

    check_edit(job, _goal(job))


def _settle(model: Any, hparams: UniEraseHyperParams) -> UniEraseHyperParams:
    from .layers import settle_layers

    return settle_layers(model, hparams)


def _settle_rome(model: Any, hparams: UniEraseHyperParams) -> UniEraseHyperParams:
    """One block: the one of GPT-J in proportion to depth."""
    from .layers import architecture, settle_layers

    depth = len(architecture(model, hparams).blocks)
    layers = hparams.layers or (min(round(depth * 5 / 28), max(0, depth - 2)),)
    if len(layers) > 1:
        raise HyperParamsError(f"layers = {shown(list(layers))}: rome edits one block. Name one, or use memit.")
    return settle_layers(model, hparams.replace(layers=layers))


EDITING: tuple[Method[Any], ...] = (
    Method(
        name="rome",
        title="a rank-one edit of one block for each request, one after another",
        paper="Meng et al. 2022, arXiv 2202.05262",
        hparams=ROMEHyperParams,
        run=_run,
        check=_check,
        settle=_settle_rome,
        needs_subjects=True,
    ),
    Method(
        name="memit",
        title="one edit of several blocks for all requests, weighed against ordinary text",
        paper="Meng et al. 2023, arXiv 2210.07229",
        hparams=MEMITHyperParams,
        run=_run,
        check=_check,
        settle=_settle,
        needs_subjects=True,
    ),
    Method(
        name="alphaedit",
        title="one edit of several blocks, only in directions that ordinary text leaves free",
        paper="Fang et al. 2024, arXiv 2410.02355",
        hparams=AlphaEditHyperParams,
        run=_run,
        check=_check,
        settle=_settle,
        needs_subjects=True,
    ),
)
