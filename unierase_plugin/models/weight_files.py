"""The contents of a model's safetensors files: names, types and shapes, read from the headers only."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

#: transformers' names for a model's weights: one file, or the index of several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    #: None if the dtype is not one of DTYPES.
    dtype: torch.dtype | None

    def read(self) -> Tensor:
        with safe_open(str(self.path), framework="pt") as file:
            found: Tensor = file.get_tensor(self.name)
        return found


def stored_weights(model: str | Path) -> dict[str, Stored]:
    """The tensors of a model (a folder or a hub id) by name; none if it has no such files.

    Raises OSError, ValueError or a SafetensorError for files that are missing or damaged.
    """
    found: dict[str, Stored] = {}
    for path in _files(model):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = Stored(path, name, tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
    return found


def _files(model: str | Path) -> list[Path]:
    folder = Path(model)
    find: Callable[[str], Path | None]
    find = partial(_in_folder, folder) if folder.is_dir() else partial(_on_hub, str(model))
    single = find(SINGLE)
    if single is not None:
        return [single]
    index = find(INDEX)
    if index is None:
        return []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for path in map(find, names) if path is not None]


def _in_folder(folder: Path, name: str) -> Path | None:
    return folder / name if (folder / name).is_file() else None


def _on_hub(model: str, name: str) -> Path | None:
    from transformers.utils.hub import cached_file

    found = cached_file(
        model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)
