"""The content of `unierase/` as data: its parts, and how they are packed, written and read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, first_words
from ..facts.request import one_spelling
from ..locate_then_edit.edit import WeightEdit
from ..locate_then_edit.solve import LowRank
from ..storage.digests import Seal, data_digest
from ..storage.fingerprints import plain
from ..storage.tensor_files import Packed, pack, write_tensors
from ..unlearning_token import UnlearningToken
from .originals import Originals

#: Version of the layout of `unierase/`. A reader refuses versions newer than its own.
SCHEMA = 1
#: Name of the folder that holds the record, and of the files in it.
RECORD = "unierase"
MANIFEST, EDITS, LEDGER, REPORT, DIGESTS = (
    "manifest.json",
    "edits.safetensors",
    "ledger.jsonl",
    "report.json",
    "digests.json",
)

#: Keys of the manifest that describe the base model.
BASE = ("model", "model_fingerprint_before")


@dataclass(frozen=True)
class Checkpoint:
    """The content of `unierase/`."""

    manifest: Mapping[str, Any]
    token: UnlearningToken | None
    #: One edit for each step, oldest first; empty for methods that train the whole model.
    edits: tuple[WeightEdit, ...]
    originals: Originals | None
    #: One dictionary for each request, oldest first, with `step` among its keys.
    ledger: list[dict[str, Any]]
    #: Measurements after the last step; empty if they are not known.
    report: Mapping[str, Any]
    #: Measurements after earlier steps, by step.
    earlier_reports: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def edit(self) -> WeightEdit:
        """All steps joined into one update for each layer, with all keys, as an adapter or a later step needs them."""
        return join_edits(self.edits)

    @property
    def reports(self) -> dict[int, Mapping[str, Any]]:
        """The measurements, by step; steps without known measurements are left out."""
        found = {**self.earlier_reports, len(self.manifest["steps"]): self.report}
        return {step: report for step, report in sorted(found.items()) if report}

    def holds(self, question: str) -> bool:
        """Whether the ledger has a line for this question. Case and white space do not matter."""
        return bool(self.find(question))

    def forgotten(self, questions: Iterable[str]) -> list[int]:
        """The numbers of the questions for which the ledger has a line."""
        hashes = {line["question_sha256"] for line in self.ledger}
        return [index for index, each in enumerate(questions) if ledger_hash(self.manifest["salt"], each) in hashes]

    def find(self, wanted: str) -> list[dict[str, Any]]:
        """The lines of one request in the ledger, at most one for each step.

        wanted: a question, a case_id, or the first 8 or more digits of a question's hash. Raises CheckpointError if it
        names several questions.
        """
        hashed = ledger_hash(self.manifest["salt"], wanted)
        lines = [line for line in self.ledger if hashed in (line["question_sha256"], line.get("case_id_sha256"))]
        if not lines and re.fullmatch(r"[0-9a-f]{8,64}", wanted):
            lines = [line for line in self.ledger if line["question_sha256"].startswith(wanted)]
        questions = {line["question_sha256"] for line in lines}
        if len(questions) > 1:
            raise CheckpointError(
                f"{first_words(wanted)} names {len(questions)} requests: "
                f"{', '.join(sorted(q[:12] for q in questions))}. Give one of these hashes, or the question."
            )
        return lines


def join_edits(edits: Sequence[WeightEdit]) -> WeightEdit:
    """The sum of several edits as one: factors and keys side by side. The norms of a sum are unknown and left out."""
    if len(edits) == 1:
        return edits[0]
    layers = sorted({layer for edit in edits for layer in edit.layers})
    parts = {layer: [edit.updates[layer] for edit in edits if layer in edit.updates] for layer in layers}
    keys = {layer: [edit.keys[layer] for edit in edits if layer in edit.keys] for layer in layers}
    return WeightEdit(
        {
            layer: LowRank(torch.cat([u.up for u in updates], dim=1), torch.cat([u.down for u in updates]))
            for layer, updates in parts.items()
        },
        keys={layer: torch.cat(found, dim=1) for layer, found in keys.items() if found},
    )


def ledger_hash(salt: str, *texts: str) -> str:
    """Hex sha256 of texts with a checkpoint's salt, after `request.one_spelling`."""
    return hashlib.sha256("\0".join([salt, *map(one_spelling, texts)]).encode("utf-8", "surrogatepass")).hexdigest()


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_record(checkpoint: Checkpoint, folder: Path) -> None:
    """Makes `folder` and writes the record's files into it, with the digests that show damage to them."""
    folder.mkdir()
    tensors, metadata = pack_checkpoint(checkpoint)
    seal = write_tensors(folder / EDITS, tensors, metadata)
    _write_json(folder / MANIFEST, checkpoint.manifest)
    _write_json(folder / REPORT, checkpoint.report)
    for step, report in checkpoint.earlier_reports.items():
        _write_json(folder / f"report-{step}.json", report)
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in plain(checkpoint.ledger)]
    (folder / LEDGER).write_text("".join(lines), encoding="utf-8")
    _write_json(folder / DIGESTS, _digests(checkpoint, seal))


def _digests(checkpoint: Checkpoint, edits: Seal) -> dict[str, Any]:
    """Digests of every file's data, of every line of the ledger, and of all of these together."""
    ledger = [data_digest(line) for line in plain(checkpoint.ledger)]
    reports = {REPORT: checkpoint.report}
    reports.update({f"report-{step}.json": report for step, report in checkpoint.earlier_reports.items()})
    files = {
        MANIFEST: data_digest(plain(checkpoint.manifest)),
        LEDGER: data_digest(ledger),
        EDITS: edits.whole,
        **{name: data_digest(plain(report)) for name, report in reports.items()},
    }
    stated = {"files": files, "lines": ledger}
    return {**stated, "all": data_digest(stated)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def pack_checkpoint(checkpoint: Checkpoint) -> Packed:
    """The contents of `edits.safetensors`."""
    tensors, metadata = pack_edits(checkpoint.edits)
    originals = checkpoint.originals
    if originals is not None:
        # These suffice to restore the base model and to check it, even if the manifest is lost.
        metadata["base"] = json.dumps({name: checkpoint.manifest.get(name) for name in BASE})
        metadata["originals"] = json.dumps({"vocabulary": originals.vocabulary, "names": dict(originals.names)})
        tensors.update({f"original.layer{layer}": weight for layer, weight in originals.projections.items()})
        rows = {name: getattr(originals, name) for name in ("input_row", "output_row", "output_bias")}
        tensors.update({f"original.token.{name}": row for name, row in rows.items() if row is not None})
    if checkpoint.token is not None:
        packed, described = pack(checkpoint.token)
        tensors.update({f"token.{name}": tensor for name, tensor in packed.items()})
        metadata["token"] = json.dumps(described)
    return tensors, metadata


def pack_edits(edits: Sequence[WeightEdit]) -> Packed:
    """Factors, keys and norms of edits, oldest first."""
    tensors: dict[str, Tensor] = {}
    norms: list[dict[str, Any]] = []
    for step, edit in enumerate(edits, start=1):
        for layer, update in edit.updates.items():
            tensors[f"step{step}.layer{layer}.up"] = update.up
            tensors[f"step{step}.layer{layer}.down"] = update.down
        tensors.update({f"step{step}.layer{layer}.keys": keys for layer, keys in edit.keys.items()})
        norms.append(
            {
                "residual_norms": list(edit.residual_norms),
                "norm_ratios": dict(edit.norm_ratios),
                "removed": dict(edit.removed),
            }
        )
    return tensors, {"norms": json.dumps(norms)}


def unpack_edits(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[WeightEdit, ...]:
    """What `pack_edits` was given."""
    norms = json.loads(metadata["norms"])
    return tuple(_unpack_step(tensors, step, entry) for step, entry in enumerate(norms, start=1))


def _unpack_step(tensors: Mapping[str, Tensor], step: int, norms: Mapping[str, Any]) -> WeightEdit:
    def by_layer(part: str) -> dict[int, Tensor]:
        pattern = re.compile(rf"step{step}\.layer(\d+)\.{part}")
        matches = {name: pattern.fullmatch(name) for name in tensors}
        return dict(sorted((int(match[1]), tensors[name]) for name, match in matches.items() if match))

    downs = by_layer("down")
    updates = {layer: LowRank(up, downs[layer]) for layer, up in by_layer("up").items()}
    ratios = {int(layer): ratio for layer, ratio in norms["norm_ratios"].items()}
    # Records written before removal existed do not have this key.
    removed = {int(layer): rank for layer, rank in norms.get("removed", {}).items()}
    return WeightEdit(
        updates=updates,
        residual_norms=tuple(norms["residual_norms"]),
        norm_ratios=ratios,
        keys=by_layer("keys"),
        removed=removed,
    )


def unpack_originals(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Originals | None:
    """The originals from the contents that `pack_checkpoint` gave; None if the method kept none."""
    if "originals" not in metadata:
        return None
    described = json.loads(metadata["originals"])
    names = {int(layer): name for layer, name in described["names"].items()}
    rows = {name: tensors.get(f"original.token.{name}") for name in ("input_row", "output_row", "output_bias")}
    projections = {layer: tensors[f"original.layer{layer}"] for layer in names}
    return Originals(projections, names, described["vocabulary"], **rows)
