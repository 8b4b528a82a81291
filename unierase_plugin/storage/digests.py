"""SHA-256 of tensors and data. A file uses them to tell later whether it still has what was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Bytes of a tensor that are copied at a time for hashing.
HASH_CHUNK = 1 << 24


def content_digests(tensors: Collection[Tensor]) -> Iterator[bytes]:
    """SHA-256 of each tensor's bytes in row-major order. As many tensors at once as there are processors."""
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) < HASH_CHUNK:
        yield from map(_content_digest, tensors)  # starting threads would take longer
        return
    # hashlib lets other threads run.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_content_digest, tensors)


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hex sha256 by name, each over dtype, shape and bytes."""
    contents = content_digests(tensors.values())
    return {
        name: hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode() + content).hexdigest()
        for (name, tensor), content in zip(tensors.items(), contents, strict=True)
    }


def data_digest(value: Any) -> str:
    """Hex sha256 of a JSON value. White space and the order of an object's keys do not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Seal:
    """Digests of a tensor file's contents: of each tensor, and of each text of its metadata."""

    tensors: Mapping[str, str]
    texts: Mapping[str, str]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Seal:
        return cls(tensor_digests(tensors), {name: data_digest(text) for name, text in metadata.items()})

    @property
    def whole(self) -> str:
        """Digest of all the digests."""
        return data_digest([self.tensors, self.texts])

    def dumps(self) -> str:
        return json.dumps({"tensors": self.tensors, "texts": self.texts, "whole": self.whole}, sort_keys=True)

    def differences(self, stated: str) -> list[tuple[str, str]]:
        """The parts that differ from `stated` (from `dumps`): ("tensor", "text" or "seal", name), in that order."""
        try:
            wanted = json.loads(stated)
            parts = {"tensor": (self.tensors, wanted["tensors"]), "text": (self.texts, wanted["texts"])}
            sound = wanted["whole"] == Seal(wanted["tensors"], wanted["texts"]).whole
            found = [
                (kind, name)
                for kind, (have, want) in parts.items()
                for name in sorted({*have, *want})
                if have.get(name) != want.get(name)
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return [("seal", "")]
        return found if sound else [*found, ("seal", "")]


def _content_digest(tensor: Tensor) -> bytes:
    found = hashlib.sha256()
    for piece in _pieces(tensor):
        found.update(piece)
    return found.digest()


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, a few rows at a time. NumPy has no bfloat16, so they are read as bytes."""
    rows = tensor if tensor.ndim else tensor[None]
    row_size = max(1, rows[:1].numel() * rows.element_size())
    for part in rows.split(max(1, HASH_CHUNK // row_size)):
        yield memoryview(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
