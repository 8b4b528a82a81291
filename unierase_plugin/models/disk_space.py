"""Estimates how much disk space a command needs, before its work starts.

The model's files tell a part of it before the model is loaded, which rules out a disk that is too small. The other
things that a run writes (original weights, factors, the token) depend on the method. They are counted once the model is
loaded.
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
from ..hparams import EditSettings, EngineSettings, HyperParams, RemovalSettings
from .adapters import adapter_base
from .architecture import find_architecture
from .loading import DTYPES
from .stored_dtype import stored_dtype
from .weight_files import stored_weights


def weights_size(model: str | os.PathLike[str], dtype: str = "") -> int:
    """Bytes of a model's weights in an output folder: in `dtype`, or in the checkpoint's dtype if it is empty.

    Reads only file headers. 0 if the size cannot be told: the model is not on this machine yet, or its files are not
    safetensors files. Loading finds out whether the files are good.
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
    """The folder itself, or the hub's copy of it on this machine. Without one, raises what the hub's client raises."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(os.fspath(model), local_files_only=True))


def model_size(model: Any, hparams: HyperParams | None = None) -> int:
    """Bytes of a loaded model in an output folder; if `hparams` are of an edit, with its original weights."""
    edited: list[Tensor] = []
    layers: tuple[int, ...] = ()
    # A removal has layers of its own, and changes those instead.
    if isinstance(hparams, EngineSettings) and not hparams.remove:
        layers = hparams.layers
    elif isinstance(hparams, RemovalSettings):
        layers = hparams.removal_layers
    if isinstance(hparams, EditSettings):
        arch = find_architecture(model, hparams.rewrite_module_tmp, hparams.layer_module_tmp)
        edited = [arch.projections[layer].weight for layer in layers if layer in arch.editable]
    return sum(_size(weight, stored_dtype(model)) for weight in (*model.parameters(), *edited))


def _size(weight: Tensor, stored: torch.dtype | None) -> int:
    return weight.numel() * (stored.itemsize if stored and weight.dtype == torch.float32 else weight.element_size())
