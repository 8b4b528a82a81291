"""What each step did, and its measurements, joined from manifest, factors and reports."""

from __future__ import annotations

from typing import Any

from .record import Checkpoint


def step_summaries(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """One dictionary for each step, oldest first.

    Keys: step, method, created, requests, taken_back, layers; ranks and update_norm_ratio by block, empty for methods
    that train the whole model; report, or None if the measurements are not known or not valid any more.
    """
    reports, found = checkpoint.reports, []
    for step, entry in enumerate(checkpoint.manifest["steps"], start=1):
        edit = checkpoint.edits[step - 1] if len(checkpoint.edits) >= step else None
        found.append(
            {
                "step": step,
                **{name: entry[name] for name in ("method", "created", "requests", "layers")},
                "taken_back": entry.get("taken_back", 0),
                "ranks": {layer: edit.rank(layer) for layer in edit.layers} if edit else {},
                "update_norm_ratio": dict(edit.norm_ratios) if edit else {},
                "report": reports.get(step),
            }
        )
    return found
