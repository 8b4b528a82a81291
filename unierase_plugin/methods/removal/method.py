"""Removal as a method of its own: without a token, and without anything that is to be said instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import HyperParamsError, shown
from ...hparams import PROMPT_FORMS, RemovalSettings
from ...settings.ranges import Range, weight
from ..contract import Changes, Job, Method


@dataclass(frozen=True)
class RemovalHyperParams(RemovalSettings):
    """A removal's settings, and those that every method has."""

    folder: ClassVar[str] = "Removal"
    #: Folder or hub id of the model that the file was made for.
    model_name: str = ""
    #: Forms of the question that are forgotten, and kept.
    prompt_forms: tuple[str, ...] = ("chat",)
    #: Extra arguments of the tokenizer's chat template.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    #: Neighbours a fact, made by rule and answered by the model, that join the facts to keep
    #: (docs/explanation/precision.md).
    retain_neighbours: int = 6
    device: str = ""
    #: Tokens of one batch at most; 0 chooses by device.
    max_batch_tokens: int = 0
    seed: int = 0
    #: Module templates, found by looking when empty.
    rewrite_module_tmp: str = ""
    layer_module_tmp: str = ""

    ranges: ClassVar[Mapping[str, Range]] = {
        "retain_neighbours": weight(1e4),
        "max_batch_tokens": weight(2**40),
    }

    def validate(self) -> None:
        super().validate()
        if not self.prompt_forms or set(self.prompt_forms) - set(PROMPT_FORMS):
            raise HyperParamsError(
                f"prompt_forms = {shown(list(self.prompt_forms))} must name some of: {', '.join(PROMPT_FORMS)}."
            )


# A removal computes with torch, which listing the methods is not to wait for.


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
    "removal",
    "takes what the model knows of the facts out of its MLPs: a teacher in closed form, distilled back",
    "this package; K-FAC after Martens and Grosse 2015, arXiv 1503.05671",
    RemovalHyperParams,
    _run,
    _check,
    _settle,
)
