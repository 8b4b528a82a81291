"""Records as earlier versions wrote them, and as damage leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from unierase_plugin.storage.tensor_files import SEAL


def without_digests(folder: Path) -> Path:
    """The folder, its record turned into one of a version that knew no digests."""
    record = folder / "unierase"
    (record / "digests.json").unlink(missing_ok=True)
    path = record / "edits.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {name: text for name, text in metadata.items() if name not in (SEAL, "base")})
    return folder


def change_ledger(folder: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
    """The folder, its ledger's lines replaced by what `change` makes of them."""
    path = folder / "unierase" / "ledger.jsonl"
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The folder, `change` done to its manifest."""
    path = folder / "unierase" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest, indent=2))
    return folder


def flip(path: Path, bit: int) -> None:
    """Turns one bit of a file round, counted from its start."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def place_of(path: Path, tensor: str) -> tuple[int, int]:
    """Where a tensor's bytes begin and end in a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
    return 8 + size + start, 8 + size + end
