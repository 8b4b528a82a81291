"""Helpers that only the demo needs."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import RECORD, read_checkpoint
from ..errors import CheckpointError
from ..facts.resources import demo_facts


def refuse_foreign_folder(folder: Path) -> None:
    """Raises CheckpointError for a folder that no earlier demo wrote, since the demo replaces only its own output."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RECORD / "manifest.json").is_file():
        raise CheckpointError(f"The folder {str(folder)!r} holds files, but no edited model. Choose another --out.")
    record = read_checkpoint(folder)
    asked = {line.get("question") for line in record.ledger}
    if len(record.manifest["steps"]) != 1 or asked != {fact["question"] for fact in demo_facts()["forget"]}:
        raise CheckpointError(f"The folder {str(folder)!r} holds another model, not the demo's. Choose another --out.")
