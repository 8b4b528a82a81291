"""Reads a record, finds the parts that are damaged, and says what can still be done with the rest.

`digests.json` holds a digest of every file, `edits.safetensors` one of each of its tensors. Records of earlier versions
have no digests. They count as not verified, and only contradictions between their parts show damage.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..storage.atomic import clear_leftovers
from ..storage.digests import data_digest
from ..storage.inputs import absolute_path, checked_path, no_folder
from ..storage.tensor_files import TensorFile, open_tensors, unpack
from ..unlearning_token import UnlearningToken
from .damage import Damage, contradictions
from .originals import Originals
from .record import (
    BASE,
    DIGESTS,
    EDITS,
    LEDGER,
    MANIFEST,
    RECORD,
    REPORT,
    SCHEMA,
    Checkpoint,
    unpack_edits,
    unpack_originals,
)

logger = logging.getLogger(__name__)

#: The most damaged places that a message names.
NAMED = 4
OTHER = "is not what was written"


@dataclass(frozen=True)
class WayBack:
    """What is needed to restore the base model, and to check that the result is the base model."""

    model: str
    #: Fingerprint of the base model.
    fingerprint: str
    originals: Originals
    token: UnlearningToken | None


@dataclass(frozen=True)
class Examined:
    """A record as far as it can be read, and its damage."""

    folder: Path
    #: None if a part cannot be read that everything except the way back depends on.
    checkpoint: Checkpoint | None
    #: None if the method kept no originals, or if they cannot be read.
    way_back: WayBack | None
    #: Whether there are digests to compare with.
    verified: bool
    damage: tuple[Damage, ...]
    #: Name of the base model: from the manifest, or else from the file of the tensors.
    base: str = ""

    def whole(self) -> Checkpoint:
        """The record. Raises CheckpointError if any part of it is damaged."""
        if self.checkpoint is None or self.damage:
            raise CheckpointError(f"{self.story()} {self.remedy()}")
        return self.checkpoint

    def up_to(self, step: int | None = None) -> Checkpoint:
        """The record, for a use that depends on its first `step` steps, or on all of them.

        Raises CheckpointError if these are damaged. Damage to other parts gives a warning.
        """
        if self.checkpoint is None or self._concerned(step):
            raise CheckpointError(f"{self.story()} {self.remedy()}")
        if self.damage:
            logger.warning("%s That is not needed here.", self.story())
        self._tell_unverified()
        return self.checkpoint

    def back(self) -> WayBack | None:
        """The way back to the base model, whatever else is damaged. The fingerprint shows whether it succeeded.

        Raises CheckpointError if it cannot be read.
        """
        if self.way_back is None and self.damage:
            raise CheckpointError(f"{self.story()} {self.remedy()}")
        if self.damage:
            logger.warning(
                "%s The base model is restored from the undamaged parts, and compared to the bit.", self.story()
            )
        self._tell_unverified()
        return self.way_back

    def gives_base(self) -> bool:
        """Whether the way back is undamaged, as far as digests tell."""
        return self.way_back is not None and not any(each.part == "originals" for each in self.damage)

    def gives_steps(self) -> list[int]:
        """Steps before the last to which a revert is possible."""
        if self.checkpoint is None or not self.gives_base():
            return []
        steps = range(1, len(self.checkpoint.manifest["steps"]))
        return [step for step in steps if not self._concerned(step)]

    def story(self) -> str:
        """What is damaged, in one sentence."""
        places = [str(each) for each in self.damage[:NAMED]]
        more = f"; and {len(self.damage) - NAMED} more" if len(self.damage) > NAMED else ""
        return f"The record in {str(self.folder / RECORD)!r} is damaged: {'; '.join(places)}{more}."

    def remedy(self, gives_base: bool | None = None) -> str:
        """What can still be done, in a few sentences. gives_base: whether restoring the base model worked, if tried."""
        base = f"the base model {self.base!r}" if self.base else "the base model"
        if not (self.gives_base() if gives_base is None else gives_base):
            if not self.damage and self.way_back is not None:
                return (
                    "The record is undamaged, but the weights beside it are not those of the edit, so the edit cannot "
                    f"be taken back from them. Put the model's files back from a copy, or fetch {base} again and run "
                    "the same command on it again."
                )
            kept = self.way_back is not None or any(each.part in ("everything", "originals") for each in self.damage)
            lost = "The original weights are damaged too, or cannot be read" if kept else "It holds no original weights"
            return (
                f"{lost}: fetch {base} again and run the same command on it again, or put the damaged files back from "
                "a copy. The edited model beside the record is not part of it."
            )
        steps = self.gives_steps()
        also = f" `--step {steps[-1]}` gives the model after step {steps[-1]} too." if steps else ""
        return (
            f"The original weights are undamaged: `unierase revert {self.folder} --out BASE` still gives {base}, to "
            f"the bit, and the same command can be run on it again.{also} Or put the damaged files back from a copy."
        )

    def _concerned(self, step: int | None) -> bool:
        if step is None:
            return any(each.part != "report" for each in self.damage)
        return any(each.concerns(step) for each in self.damage)

    def _tell_unverified(self) -> None:
        if not self.verified:
            logger.warning(
                "The record in %s is not verified: an earlier version wrote it, without digests. Damage shows only if "
                "its parts contradict one another.",
                self.folder,
            )


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """The record of an output folder. The model itself is not loaded.

    Raises CheckpointError if the folder is no output folder of this package, is of a newer schema, or is damaged.
    """
    return examine(folder).whole()


def is_edited(folder: str | os.PathLike[str]) -> bool:
    """Whether there is a record in the folder, damaged or not."""
    record = checked_path(folder, CheckpointError) / RECORD
    return any((record / name).is_file() for name in (MANIFEST, EDITS, LEDGER, DIGESTS))


def examine(folder: str | os.PathLike[str]) -> Examined:
    """The record of an output folder and all damage to it.

    Raises CheckpointError if the folder is no output folder of this package, or is of a newer schema.
    """
    target = absolute_path(folder, CheckpointError)
    if not target.exists():
        clear_leftovers(target)  # a process that was killed between two renames left the folder under another name
    if not is_edited(target):
        missing = no_folder(target) or f"{str(target)!r} has no {RECORD}/{MANIFEST}, so it holds no edit. "
        raise CheckpointError(f"{missing}Give the output folder (--out) of a run.")
    return _Reading(target).result()


@dataclass
class _Reading:
    """Goes through the files one after the other, and notes all damage."""

    target: Path
    damage: list[Damage] = field(default_factory=list)

    def result(self) -> Examined:
        record = self.target / RECORD
        edits = self._tensors(record / EDITS)
        stated = self._stated(record / DIGESTS, bool(edits and edits.sealed))
        manifest = self._manifest(record / MANIFEST, stated)
        ledger = self._ledger(record / LEDGER, stated)
        reports = self._reports(record, manifest, stated)
        if edits is not None:
            self._compare_edits(edits, stated)
        token, steps, originals, base = self._unpacked(edits)
        checkpoint = None
        if manifest is not None and ledger is not None and edits is not None and steps is not None:
            last = len(manifest["steps"])
            report = reports.pop(last, {})
            checkpoint = Checkpoint(
                manifest=manifest,
                token=token,
                edits=steps,
                originals=originals,
                ledger=ledger,
                report=report,
                earlier_reports=reports,
            )
            if stated is None or not self.damage:  # else they follow from the damage found
                self.damage += contradictions(checkpoint)
        model, fingerprint = (str((base or manifest or {}).get(name) or "") for name in BASE)
        back = WayBack(model, fingerprint, originals, token) if originals is not None and fingerprint else None
        return Examined(
            folder=self.target,
            checkpoint=checkpoint,
            way_back=back,
            verified=stated is not None,
            damage=tuple(self.damage),
            base=model,
        )

    def _note(self, file: str, place: str, what: str, part: str = "everything", step: int = 0) -> None:
        self.damage.append(Damage(file=file, place=place, what=what, part=part, step=step))

    # --- the files ----------------------------------------------------------------------------------------------------

    def _stated(self, path: Path, sealed: bool) -> dict[str, Any] | None:
        """The digests; None for a record of an earlier version, and empty if the file is damaged."""
        if not path.exists():
            if not sealed:
                return None
            self._note(DIGESTS, "", "is missing")
            return {}
        stated = self._parsed(path)
        if stated is None:
            return {}
        try:
            parts = {name: stated[name] for name in ("files", "lines")}
            sound = stated["all"] == data_digest(parts) and isinstance(parts["files"], dict)
        except (KeyError, TypeError):
            sound = False
        if not sound:
            self._note(DIGESTS, "", OTHER)
            return {}
        return parts

    def _manifest(self, path: Path, stated: Mapping[str, Any] | None) -> dict[str, Any] | None:
        manifest = self._parsed(path)
        if manifest is None:
            return None
        if self._differs(MANIFEST, data_digest(manifest), stated):
            self._note(MANIFEST, "", OTHER)
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if type(schema) is not int:
            self._note(MANIFEST, "", "has no schema version")
            return None
        if schema > SCHEMA and not self.damage:
            raise _newer(self.target, manifest, schema)
        if not isinstance(manifest.get("steps"), list):
            self._note(MANIFEST, "", "names no steps")
            return None
        return dict(manifest)

    def _ledger(self, path: Path, stated: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
        text = self._text(path, "ledger")
        if text is None:
            return None
        lines, wanted = text.split("\n")[: -1 if text.endswith("\n") else None], (stated or {}).get("lines")
        found: list[dict[str, Any]] = []
        digests: list[str] = []
        for number, line in enumerate(lines, start=1):
            value = _parse(line)
            digests.append(data_digest(value))
            same = wanted is None or len(wanted) != len(lines) or digests[-1] == wanted[number - 1]
            if isinstance(value, dict) and same:
                found.append(value)
            else:
                self._note(LEDGER, f"line {number}", OTHER if isinstance(value, dict) else "is no object", "ledger")
        if wanted is not None and len(wanted) != len(lines):
            self._note(LEDGER, "", f"holds {len(lines)} lines, but {len(wanted)} were written", "ledger")
        return found if len(found) == len(lines) else None

    def _reports(
        self, record: Path, manifest: Mapping[str, Any] | None, stated: Mapping[str, Any] | None
    ) -> dict[int, Mapping[str, Any]]:
        """The measurements, by step; steps whose file is damaged are left out."""
        last = len(manifest["steps"]) if manifest else 1
        names = {step: f"report-{step}.json" for step in range(1, last)} | {last: REPORT}
        written = set((stated or {}).get("files", ())) | {REPORT}
        found: dict[int, Mapping[str, Any]] = {}
        for step, name in names.items():
            if name not in written and not (record / name).exists():
                continue
            report = self._parsed(record / name, "report")
            if report is None:
                continue
            if not isinstance(report, dict) or self._differs(name, data_digest(report), stated):
                self._note(name, "", OTHER, "report", step)
            else:
                found[step] = report
        return found

    def _tensors(self, path: Path) -> TensorFile | None:
        try:
            return open_tensors(path)
        except CheckpointError as error:
            self._note(EDITS, "", f"cannot be read ({error.__cause__ or error})")
            return None

    def _compare_edits(self, edits: TensorFile, stated: Mapping[str, Any] | None) -> None:
        for kind, name in edits.differences:
            part, step = _part(kind, name)
            self._note(EDITS, f"{kind} {name}" if name else "its digests", OTHER, part, step)
        if stated and not edits.sealed:
            self._note(EDITS, "its digests", "are missing")
        elif not edits.differences and self._differs(EDITS, edits.seal.whole, stated):
            self._note(EDITS, "", "is not the one that was written with the other files")

    def _unpacked(
        self, edits: TensorFile | None
    ) -> tuple[UnlearningToken | None, tuple[Any, ...] | None, Originals | None, dict[str, Any] | None]:
        """Token, steps, originals, and the base model's description. Damage to one does not affect the others."""
        if edits is None:
            return None, None, None, None
        tensors, texts = edits.tensors, edits.metadata
        rows = {name.removeprefix("token."): each for name, each in tensors.items() if name.startswith("token.")}
        token = None
        if "token" in texts:
            token = self._try("token", lambda: unpack(UnlearningToken, rows, json.loads(texts["token"])))
        steps = self._try("factors", lambda: unpack_edits(tensors, texts))
        originals = self._try("originals", lambda: unpack_originals(tensors, texts))
        base = self._try("originals", lambda: dict(json.loads(texts["base"]))) if "base" in texts else None
        return token, steps, originals, base

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _try(self, part: str, unpack: Callable[[], Any]) -> Any:
        try:
            return unpack()
        except (CheckpointError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if not any(each.file == EDITS and each.part == part for each in self.damage):
                self._note(EDITS, "", f"lacks {error}" if isinstance(error, KeyError) else f"({error})", part)
            return None

    def _differs(self, name: str, digest: str, stated: Mapping[str, Any] | None) -> bool:
        return bool(stated) and stated is not None and stated["files"].get(name) != digest

    def _text(self, path: Path, part: str) -> str | None:
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            self._note(path.name, "", "is missing", part)
        except (OSError, ValueError) as error:
            self._note(path.name, "", f"cannot be read ({error})", part)
        return None

    def _parsed(self, path: Path, part: str = "everything") -> Any:
        """The value of a JSON file; None if it cannot be read, which is noted as damage."""
        text = self._text(path, part)
        if text is None:
            return None
        value = _parse(text)
        if value is None:
            self._note(path.name, "", "is no JSON", part)
        return value


def _parse(text: str) -> Any:
    """The value of a JSON text; None if the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _part(kind: str, name: str) -> tuple[str, int]:
    """The part of the record that a tensor or a text of the metadata belongs to, and its step."""
    step = re.match(r"step(\d+)\.", name) if kind == "tensor" else None
    if step:
        return "factors", int(step[1])
    if name.startswith("original") or name == "base":
        return "originals", 0
    return ("token" if name.startswith("token") else "factors" if name == "norms" else "everything"), 0


def _newer(target: Path, manifest: Mapping[str, Any], schema: int) -> CheckpointError:
    versions = manifest.get("versions")
    writer = (versions if isinstance(versions, dict) else {}).get("unierase_plugin", "of a later version")
    return CheckpointError(
        f"{str(target)!r} is of schema {schema}, written by unierase-plugin {writer}; this version reads up to "
        f"schema {SCHEMA}. Upgrade it: pip install -U unierase-plugin."
    )
