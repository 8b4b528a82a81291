"""How much room on a disk a command will need, estimated before its work starts.

What the files of a model say is known before it is loaded, and rules out a disk that cannot do. What else a run writes
(weights as they were, factors, the token) depends on the method, and is counted once the model is there.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UniEraseError
from .adapters import adapter_base
from .architecture import find_architecture
from .loading import DTYPES
from .stored_dtype import stored_dtype
from .weight_files import stored_weights


def weights_size(model: str | os.PathLike[str], dtype: str = "") -> int:
    """Bytes of a model's weights in a folder that a run writes: in `dtype`, or the checkpoint's where it is empty.

    Reads headers alone. 0 where that cannot be told: the model is not on this machine yet, or its files are no
    safetensors files; whether they are any good is told when they are loaded.
    """
    try:
        place = local_folder(model)
        base = adapter_base(str(place))
        found = stored_weights(local_folder(base) if base else place)
    except (OSError, ValueError, SafetensorError, UniEraseError):
        return 0
    wanted = DTYPES.get(dtype)
    return sum(math.prod(each.shape) * (wanted or each.dtype or torch.float32).itemsize for each in found.values())


def local_folder(model: str | os.PathLike[str]) -> Path:
    """The folder itself, or the hub's copy of it on this machine. Raises what the hub's client raises without one."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(os.fspath(model), local_files_only=True))


def model_size(model: Any, hparams: Any = None) -> int:
    """Bytes of a loaded model in a folder; where `hparams` are of an edit, with the edited weights as they were."""
    edited = []
    if hasattr(hparams, "rewrite_module_tmp"):
        arch = find_architecture(model, hparams.rewrite_module_tmp, hparams.layer_module_tmp)
        # A removal has blocks of its own, and changes those instead.
        removes = getattr(hparams, "remove", not hasattr(hparams, "layers"))
        layers = hparams.removal_layers if removes else hparams.layers
        edited = [arch.projections[layer].weight for layer in layers if 0 <= layer < len(arch.projections)]
    return sum(_size(weight, stored_dtype(model)) for weight in (*model.parameters(), *edited))


def _size(weight: Tensor, stored: torch.dtype | None) -> int:
    return weight.numel() * (stored.itemsize if stored and weight.dtype == torch.float32 else weight.element_size())
