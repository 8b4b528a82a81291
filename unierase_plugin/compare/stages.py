"""The folder of one method's run: what it is to do, and each finished stage, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..plugins.registration import foreign_code
from ..storage.atomic import write_json
from ..storage.fingerprints import digest, plain
from .entries import REFERENCE, UNEDITED, Entry, settings_of

logger = logging.getLogger(__name__)

#: Version of the stages' files. A run of another version is not taken up.
STAGES_VERSION = 1

JOB, FAILED, LOG = "job.json", "failed.json", "log.txt"
#: Name of the stage that says that a run is done, and of the digest that every stage holds of itself.
DONE, DIGEST = "done", "sha256"
#: A stage keeps a digest of this many bytes at the start of each of its model's files, beside their sizes.
BEGINNING = 1 << 20
#: The phase that the process names if the disk is full or cannot be written.
CANNOT_WRITE = "cannot write"
#: The stage of the figures that settings are chosen by.
VALIDATION = "validation"


@dataclass(frozen=True)
class MethodRun:
    """What one process does: one method with its settings, one seed, one scenario. It is the run's job.json."""

    label: str
    method: str
    changes: Mapping[str, Any]
    #: Settings that were chosen by tuning, or are being tried.
    tried: Mapping[str, Any]
    #: Whether it is a try of settings, which is measured on the validation parts alone.
    is_try: bool
    seed: int
    scenario: str
    steps: int
    model: str
    #: File of all facts and their parts.
    facts: str
    #: Figures of the unedited model, and truth ratios of the reference: files; "" where there are none.
    before: str = ""
    ratios: str = ""
    corpus: str = ""
    device: str = ""
    dtype: str = ""
    max_batch_tokens: int = 0
    batch_size: int = 0
    #: Retention at which forgetting is read a second time, and steps of the bisection; 0 leaves it out.
    target: float = 0.95
    bisections: int = 5
    utility: Sequence[str] = ()
    utility_limit: int = 0
    audit: Sequence[str] = ()
    metrics: Sequence[str] = ()
    #: The unedited model's folder for the audit is `model`; the reference's, where there is one.
    reference: str = ""
    keep_model: bool = False

    @property
    def is_control(self) -> bool:
        """Whether a model is measured as it is."""
        return self.method in (UNEDITED, REFERENCE)

    def key(self, facts: str) -> str:
        """The run's identity. facts: the digest of the facts' file, whose name does not count."""
        fields, names = asdict(self), {"method": "plugin", "solver": "solver_plugin"}
        for name in ("facts", "before", "ratios", "keep_model"):
            fields.pop(name)
        if not self.metrics:  # runs of earlier versions had none
            fields.pop("metrics")
        entry = Entry(label=self.label, method=self.method, changes=self.changes)
        settings = None if self.is_control else settings_of(entry, self.model, self.tried)
        plugins = foreign_code(self.method, settings)
        fields |= {names[kind]: identity for kind, identity in plugins.items()}
        # The reference had failed, so that this run is measured without its truth ratios. With them it is another run.
        if self.reference and not self.ratios and not self.is_try and self.method != REFERENCE:
            fields["without"] = "ratios"
        return digest([STAGES_VERSION], plain(fields), [facts])[:12]


def read_json(path: Path) -> Any:
    """None where there is no such file, or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def contents(folder: Path) -> dict[str, list[Any]]:
    """The size of every file in a folder, and the SHA-256 of its beginning: they tell whether the folder is whole."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _beginning(path)] for path in files}


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(BEGINNING)).hexdigest()


class Stages:
    """The finished stages in a run's folder.

    Each holds a digest of itself, so that a file that was changed counts as absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Names of the stages that were asked for, in order.
        self.names: list[str] = []

    def __getitem__(self, name: str) -> Any:
        path = self.folder / f"{name}.json"
        found = read_json(path)
        if not isinstance(found, dict):
            return None
        # Earlier versions wrote no digest.
        stated = found.pop(DIGEST, None)
        if stated is not None and stated != digest(found):
            logger.warning("Computing again what %s does not hold any more as it was written.", path)
            return None
        return found

    def __setitem__(self, name: str, value: Mapping[str, Any]) -> None:
        found = plain(value)
        write_json(self.folder / f"{name}.json", {**found, DIGEST: digest(found)})

    def once(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> Any:
        """What the stage holds. It is computed if it is not there yet."""
        self.names.append(name)
        if self[name] is None:
            self[name] = compute()
        return self[name]

    def finish(self, label: str) -> None:
        """Marks the run as done, with the names of its stages."""
        self[DONE] = {"label": label, "stages": list(dict.fromkeys(self.names))}

    @property
    def are_done(self) -> bool:
        """Whether the run is marked as done, and every stage that it had then is still there."""
        done = self[DONE]
        if done is None:
            return False
        # Earlier versions did not name them.
        names = done.get("stages") or [path.stem for path in self.folder.glob("*.json")]
        return all(self[name] is not None for name in names)
