"""Methods that fine-tune: each is a term on the forget set, one on the retain set, and settings."""

from __future__ import annotations

from typing import Any

from ...errors import HyperParamsError
from ..contract import Changes, Job, Method
from . import settings

YUAN = "Yuan et al. 2024, arXiv 2410.08109"
NPO = "Zhang et al. 2024, arXiv 2404.05868"
DPO = "Rafailov et al. 2023, arXiv 2305.18290; for unlearning Zhang et al. 2024, arXiv 2404.05868"
TOFU = "Maini et al. 2024, arXiv 2401.06121"


def fine_tuning(
    name: str, title: str, paper: str, hparams: type[settings.TrainingHyperParams], forget: str, retain: str
) -> Method[Any]:
    """A method from two terms, by their names in `terms.TERMS`."""

    # The terms import torch. Listing the methods must not wait for it.
    def run(job: Job[Any]) -> Changes:
        from .terms import TERMS
        from .training import train

        return train(job, TERMS[forget], TERMS[retain])

    def check(job: Job[Any]) -> None:
        from .terms import TERMS
        from .training import check_trainable

        check_trainable(job, TERMS[forget], TERMS[retain])

    return Method(name=name, title=title, paper=paper, hparams=hparams, run=run, check=check)


def _rmu(job: Job[settings.RMUHyperParams]) -> Changes:
    from .terms import TERMS
    from .training import down_projections_below, train

    return train(job, TERMS["rmu"], TERMS["states"], down_projections_below)


def _check_rmu(job: Job[settings.RMUHyperParams]) -> None:
    from .terms import TERMS
    from .training import check_trainable

    if job.hparams.gradient_checkpointing:
        raise HyperParamsError("gradient_checkpointing = True: rmu runs a part of the model only. Set it to False.")
    check_trainable(job, TERMS["rmu"], TERMS["states"])


def _settle_rmu(model: Any, hparams: settings.RMUHyperParams) -> settings.RMUHyperParams:
    from ...models.architecture import find_architecture

    arch = find_architecture(model)
    wanted = round(len(arch.blocks) * 7 / 32)
    layer = min(arch.editable, key=lambda at: abs(at - wanted)) if hparams.layer < 0 else hparams.layer
    arch.check_layers([layer])
    return hparams.replace(layer=layer)


FINE_TUNING: tuple[Method[Any], ...] = (
    fine_tuning(
        "ga_gd",
        "gradient ascent on the forget set, descent on the retain set",
        TOFU,
        settings.AscentGDHyperParams,
        "ga",
        "gd",
    ),
    fine_tuning(
        "ga_kl",
        "gradient ascent on the forget set; imitates the original model on the retain set",
        TOFU,
        settings.AscentKLHyperParams,
        "ga",
        "kl",
    ),
    fine_tuning(
        "npo_gd",
        "negative preference optimisation on the forget set, descent on the retain set",
        NPO,
        settings.NPOGDHyperParams,
        "npo",
        "gd",
    ),
    fine_tuning(
        "npo_kl",
        "negative preference optimisation; imitates the original model on the retain set",
        NPO,
        settings.NPOKLHyperParams,
        "npo",
        "kl",
    ),
    fine_tuning(
        "me_gd",
        "uniform predictions on the forget set, descent on the retain set",
        YUAN,
        settings.MEGDHyperParams,
        "me",
        "gd",
    ),
    fine_tuning(
        "dpo_gd",
        'prefers "I don\'t know" to the answer on the forget set, descent on the retain set',
        DPO,
        settings.DPOGDHyperParams,
        "dpo",
        "gd",
    ),
    fine_tuning(
        "dpo_kl",
        'prefers "I don\'t know" to the answer; imitates the original model on the retain set',
        DPO,
        settings.DPOKLHyperParams,
        "dpo",
        "kl",
    ),
    fine_tuning(
        "idk_ap",
        'learns "I don\'t know" on the forget set, and to prefer the answer on the retain set',
        YUAN,
        settings.IDKAPHyperParams,
        "idk",
        "ap",
    ),
    fine_tuning(
        "simnpo",
        "NPO with the mean log-likelihood per token, without a reference model",
        "Fan et al. 2024, arXiv 2410.07163",
        settings.SimNPOHyperParams,
        "simnpo",
        "gd",
    ),
    fine_tuning(
        "undial",
        "imitates its own predictions with the memorised token lowered",
        "Dong et al. 2024, arXiv 2402.10052",
        settings.UNDIALHyperParams,
        "undial",
        "gd",
    ),
    Method(
        name="rmu",
        title="steers a block's states on the forget set to a random direction",
        paper="Li et al. 2024, arXiv 2403.03218",
        hparams=settings.RMUHyperParams,
        run=_rmu,
        check=_check_rmu,
        settle=_settle_rmu,
    ),
)
