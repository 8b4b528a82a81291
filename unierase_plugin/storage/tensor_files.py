"""Safetensors files with digests of their contents. Reading a file detects damage."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .atomic import whole_file
from .digests import Seal

#: The contents of one file: named tensors, and the text that belongs to them.
Packed = tuple[dict[str, Tensor], dict[str, str]]
#: An error names at most this many damaged parts of a file.
NAMED = 3
#: The metadata entry that has the digests of everything else in the file.
SEAL = "sha256"

_Record = TypeVar("_Record")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Seal:
    """Writes a safetensors file, whole or not at all (`whole_file`), and returns the digests of its contents.

    Raises WriteError if the disk is full or the folder is not writable; the old file is then unchanged.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    seal = Seal.of(tensors, metadata)
    with whole_file(path, size) as partial:
        save_file(_writable(tensors), str(partial), {**metadata, SEAL: seal.dumps()})
    return seal


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and without shared storage, which safetensors refuses."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        local = tensor.detach().cpu().contiguous()
        place = local.untyped_storage().data_ptr()
        ready[name] = local.clone() if place in storages else local
        storages.add(place)
    return ready


@dataclass(frozen=True)
class TensorFile:
    """The contents of a safetensors file, and which parts differ from what was written."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    #: Digests of the contents as they are now.
    seal: Seal
    #: Whether the file states its digests; files of earlier versions do not.
    sealed: bool
    #: ("tensor", "text" or "seal", name) of each part that differs from them.
    differences: Sequence[tuple[str, str]]


def open_tensors(path: Path) -> TensorFile:
    """Reads all that is readable. Raises CheckpointError for a file that is missing, cut short or of another kind."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {str(path)!r}.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged or cut short ({error}).") from error
    stated = metadata.pop(SEAL, None)
    seal = Seal.of(tensors, metadata)
    return TensorFile(
        tensors=tensors,
        metadata=metadata,
        seal=seal,
        sealed=stated is not None,
        differences=[] if stated is None else seal.differences(stated),
    )


def read_tensors(path: Path) -> Packed:
    """The tensors and metadata of a file.

    Raises CheckpointError if the file is missing, cut short, or differs from what was written.
    """
    found = open_tensors(path)
    if found.differences:
        names = ", ".join(name or kind for kind, name in found.differences[:NAMED])
        raise CheckpointError(f"{str(path)!r} is damaged: {names} is not what was written.")
    return found.tensors, found.metadata


def refuse_other(path: Path, record: str, what: str) -> None:
    """Raises CheckpointError if `path` is something other than a file of such a record, before it is replaced."""
    if not os.path.lexists(path):
        return
    try:
        with safe_open(str(path), framework="pt") as file:
            found = (file.metadata() or {}).get("record")
    except (SafetensorError, OSError, ValueError, RuntimeError):
        found = None
    if found != record:
        raise CheckpointError(f"{str(path)!r} exists and holds no {what}, so it is not replaced. Name another file.")


def pack(record: Any) -> Packed:
    """A dataclass as the contents of one file.

    Fields that are tensors, or tensors by layer, become tensors (`moments.3`). All others become one JSON text.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for spec in dataclasses.fields(record):
        value = getattr(record, spec.name)
        if isinstance(value, Tensor):
            tensors[spec.name] = value
        elif isinstance(value, Mapping):
            tensors.update({f"{spec.name}.{layer}": tensor for layer, tensor in value.items()})
        else:
            others[spec.name] = value
    return tensors, {"record": type(record).__name__, "fields": json.dumps(others)}


def unpack(kind: type[_Record], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> _Record:
    """The dataclass that `pack` packed.

    Raises CheckpointError if the file has a record of another kind, or of another version of this package.
    """
    fields: dict[str, Any] = {}
    try:
        if metadata["record"] != kind.__name__:
            raise TypeError(f"it holds {metadata['record']}")
        for name, value in json.loads(metadata["fields"]).items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        fields.update({name: tensor for name, tensor in tensors.items() if "." not in name})
        # The file has no useful order, and layers are processed from the bottom up.
        by_layer = sorted((int(name.rpartition(".")[2]), name) for name in tensors if "." in name)
        for layer, name in by_layer:
            fields.setdefault(name.rpartition(".")[0], {})[layer] = tensors[name]
        return kind(**fields)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The file does not hold {kind.__name__} as this version writes it ({error}). Delete it."
        ) from error
