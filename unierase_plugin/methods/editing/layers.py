"""Which blocks an edit changes: those that the settings name, or blocks chosen by the model's depth."""

from __future__ import annotations

from typing import Any

from ...errors import HyperParamsError, shown
from ...hparams import UniEraseHyperParams
from ...locate_then_edit.solvers import SOLVERS
from ...models.architecture import Architecture, find_architecture
from ...models.experts import Experts
from ...models.served import check_served
from ..removal.job import settle_removal


def settle_layers(model: Any, hparams: UniEraseHyperParams) -> UniEraseHyperParams:
    """The settings with the blocks of the edit and of a removal, chosen by the model's depth or checked against it.

    They are chosen among the blocks that have an MLP.
    """
    arch = architecture(model, hparams)
    layers = arch.check_layers(hparams.layers or [arch.editable[at] for at in default_layers(len(arch.editable))])
    if layers[-1] == len(arch.blocks) - 1:
        raise HyperParamsError(
            f"layers = {shown(list(layers))}: the last block cannot be edited, since no attention follows it to carry "
            f"the edit from the fact to the answer. Choose from 0 to {len(arch.blocks) - 2}."
        )
    # Passes of values begin after the last edited block.
    check_served(arch, [layers[-1] + 1])
    mixed = [layer for layer in layers if isinstance(arch.projections[layer], Experts)]
    if mixed and hparams.solver not in SOLVERS:
        raise HyperParamsError(
            f"solver = {shown(hparams.solver)} solves for one matrix, but block {mixed[0]} is a mixture of experts. "
            f"Use one of: {', '.join(SOLVERS)}."
        )
    settled = hparams.replace(layers=layers)
    return settle_removal(arch, settled) if hparams.remove else settled


def changed_layers(hparams: UniEraseHyperParams) -> tuple[int, ...]:
    """The blocks that settled hyper-parameters change, ascending."""
    return hparams.removal_layers if hparams.remove else hparams.layers


def default_layers(blocks: int) -> tuple[int, ...]:
    """Five early blocks in proportion to depth: 4 to 8 of 32, as for Llama. Fewer in shallow models, never the last."""
    first = round(blocks / 8)
    return tuple(range(first, max(first + 1, min(first + 5, blocks - 1))))


def architecture(model: Any, hparams: UniEraseHyperParams) -> Architecture:
    """Finds the blocks and MLP output projections, by the module templates of the settings if these are given.

    Raises the errors of `find_architecture`.
    """
    return find_architecture(model, hparams.rewrite_module_tmp, hparams.layer_module_tmp)
