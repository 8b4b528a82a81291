"""Takes requests out of a closed-form edit that was solved for all of them together.

With keys K (m, n), residual R (d, n), B = M^{-1} K and G = K^T B, the edit is Delta = R D, D = (I + G)^{-1} B^T. This
holds for the ridge solution, and for the null space with M^{-1} restricted to it. M is not kept and not needed:
D K = (I + G)^{-1} G gives S = (I + G)^{-1} = I - D K. Let J be the columns to remove and I those that stay. By
blockwise inversion, (I + G_II)^{-1} is S_II - S_IJ S_JJ^{-1} S_JI. So the edit solved without J is Delta' = R_I D' with

    D' = (I + G_II)^{-1} B_I^T = D_I - S_IJ S_JJ^{-1} D_J = D_I + (D_I K_J) (I - D_J K_J)^{-1} D_J

and costs a |J| x |J| system. It is exact for the stored K and R, and so for a step that edits one block. In a step of
several blocks, K and R of the upper blocks were measured after the lower blocks had been edited for J too. That stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..locate_then_edit.edit import WeightEdit
from ..locate_then_edit.solve import LowRank

#: If |D K - (D K)^T| / |D K| is greater than this, a step's columns were not solved for together.
ASYMMETRY = 1e-3


def edit_without(edit: WeightEdit, gone: Sequence[int]) -> WeightEdit:
    """The edit of a step without the columns `gone`, in every block. A block without columns has no update.

    The remaining residuals are not known any more, so residual_norms is empty. Raises CheckpointError if the step was
    not one joint solve, or if its record has no keys.
    """
    updates: dict[int, LowRank] = {}
    ratios: dict[int, float] = {}
    keys: dict[int, Tensor] = {}
    for layer, update in edit.updates.items():
        stay = _others(gone, edit.rank(layer))
        if not stay:
            continue
        if layer not in edit.keys:
            raise CheckpointError(
                f"The record has no keys of block {layer}, so a single request cannot be taken out of its step. Revert "
                "the whole step (--step)."
            )
        updates[layer] = without_columns(update, edit.keys[layer], gone)
        keys[layer] = edit.keys[layer][:, stay]
        if layer in edit.norm_ratios:
            ratios[layer] = edit.norm_ratios[layer] * updates[layer].norm() / update.norm()
    return WeightEdit(updates, (), ratios, keys)


def without_columns(update: LowRank, keys: Tensor, gone: Sequence[int]) -> LowRank:
    """The update of one block solved again without the columns `gone`, from its factors and keys (m, n), as float32."""
    up, down, inputs = update.up.double(), update.down.double(), keys.double()
    stay, leave = _others(gone, up.shape[1]), list(gone)
    share = down @ inputs
    # The negated comparison also catches NaN, which a damaged record may hold.
    if share.shape[0] != share.shape[1] or not float((share - share.T).norm()) <= ASYMMETRY * float(share.norm()):
        raise _not_joint()
    share = (share + share.T) / 2
    # I - D_J K_J is definite for every joint solve. Rounding can hide this if a key is almost interpolated.
    factor, info = torch.linalg.cholesky_ex(torch.eye(len(leave), dtype=share.dtype) - share[leave][:, leave])
    if int(info):
        raise _not_joint()
    change = share[stay][:, leave] @ torch.cholesky_solve(down[leave], factor)
    return LowRank(up[:, stay].float(), (down[stay] + change).float())


def _others(gone: Sequence[int], count: int) -> list[int]:
    return [column for column in range(count) if column not in set(gone)]


def _not_joint() -> CheckpointError:
    return CheckpointError(
        "A single request cannot be taken out of this step: its requests were not solved for together, or float32 "
        "factors do not tell them apart. Revert the whole step (--step)."
    )
