"""Checks an output folder on demand: the record against its digests, the weights against the record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..storage.fingerprints import model_fingerprint
from .contents import changed_contents
from .damage import misfits
from .integrity import Examined, examine
from .record import DIGESTS, EDITS, LEDGER, MANIFEST, REPORT
from .revert import load_saved, restore_base

HOLDS, DAMAGED, CHANGED, NOT_VERIFIED, UNKNOWN = "holds", "damaged", "changed", "not verified", "unknown"


@dataclass(frozen=True)
class Verification:
    """Which parts of an output folder are undamaged. `weights` is one of HOLDS, DAMAGED and UNKNOWN."""

    record: Examined
    weights: str
    #: The reason in words, if `weights` is DAMAGED or UNKNOWN.
    why: str
    #: Whether `unierase revert` gives the base model.
    gives_base: bool
    #: Other files (configuration, tokenizer) that were changed since; None if the folder has no list.
    changed: tuple[str, ...] | None = None

    @property
    def holds(self) -> bool:
        """Whether no damage was found."""
        return not self.record.damage and self.weights == HOLDS and not self.changed

    def rows(self) -> list[dict[str, str]]:
        """Part, state and fault of each file of the record, of the weights, and of all other files together."""
        found = []
        for name in (MANIFEST, LEDGER, EDITS, "reports", DIGESTS):
            damage = [each for each in self.record.damage if _group(each.file) == name]
            if name != DIGESTS or damage or self.record.verified:
                state = DAMAGED if damage else HOLDS if self.record.verified else NOT_VERIFIED
                what = "; ".join(f"{each.place} {each.what}".strip() for each in damage)
                found.append({"part": name, "state": state, "what": what})
        found.append({"part": "weights", "state": self.weights, "what": self.why})
        state = NOT_VERIFIED if self.changed is None else CHANGED if self.changed else HOLDS
        return [*found, {"part": "other files", "state": state, "what": ", ".join(self.changed or ())}]

    def possible(self) -> list[str]:
        """Names of the commands that still work correctly."""
        checkpoint, untouched = self.record.checkpoint, self.weights == HOLDS
        whole = checkpoint is not None and all(each.part == "report" for each in self.record.damage)
        edits = whole and self.record.way_back is not None and bool(checkpoint and checkpoint.edits)
        found = {
            "revert": self.gives_base,
            **{f"revert --step {step}": untouched for step in self.record.gives_steps()},
            "revert --request": edits and untouched,
            "export": edits,
            "run": whole and untouched,
        }
        return [name for name, can in found.items() if can]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": str(self.record.folder),
            "holds": self.holds,
            "digests": self.record.verified,
            "parts": self.rows(),
            "possible": self.possible(),
        }


def verify_folder(folder: str | Path) -> Verification:
    """Checks a whole output folder: the record, the model's weights by their fingerprint, and all other files.

    If record or weights are damaged, the base model is restored in memory, to see whether this is still possible.
    Raises CheckpointError if the folder is no output folder of this package.
    """
    found = examine(folder)
    names = changed_contents(found.folder)
    changed = None if names is None else tuple(names)
    try:
        model = load_saved(found.folder)
    except CheckpointError as error:
        return Verification(record=found, weights=DAMAGED, why=str(error), gives_base=False, changed=changed)
    weights, why = _weights(model, found)
    gives_base = found.way_back is not None
    if found.way_back is not None and (weights != HOLDS or found.damage):
        gives_base = restore_base(model, found.way_back)
    return Verification(record=found, weights=weights, why=why, gives_base=gives_base, changed=changed)


def _weights(model: Any, found: Examined) -> tuple[str, str]:
    if found.checkpoint is None or any(each.file == MANIFEST for each in found.damage):
        return UNKNOWN, f"{MANIFEST}, which holds their fingerprint, is damaged"
    originals, token = found.checkpoint.originals, found.checkpoint.token
    wrong = misfits(model, originals, token) if originals is not None else []
    if wrong:
        return DAMAGED, wrong[0]
    if model_fingerprint(model) != found.checkpoint.manifest["model_fingerprint_after"]:
        return DAMAGED, "were changed after the edit: trained further, cast to another dtype, or damaged"
    return HOLDS, ""


def _group(file: str) -> str:
    return "reports" if file.startswith(REPORT.partition(".")[0]) else file
