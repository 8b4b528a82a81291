"""Files of a cell: what it is to do, and each finished stage, so that one that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..store import digest, plain

#: Version of the stages' files; another one is another cell.
STAGES_VERSION = 1

JOB, FAILED, LOG = "job.json", "failed.json", "log.txt"


@dataclass(frozen=True)
class Cell:
    """One method with its settings, one seed, one scenario: what one process does."""

    label: str
    method: str
    changes: Mapping[str, Any]
    #: Settings that were chosen by tuning, or are being tried.
    tried: Mapping[str, Any]
    #: Whether it is a try, which is measured on the validation parts alone.
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
    #: The unedited model's folder for the audit is `model`; the reference's, where there is one.
    reference: str = ""
    keep_model: bool = False

    def key(self, facts: str) -> str:
        """What tells this cell from any other. `facts`: digest of the facts' file, whose name does not count."""
        fields = asdict(self)
        for name in ("facts", "before", "ratios", "keep_model"):
            fields.pop(name)
        return digest([STAGES_VERSION], plain(fields), [facts])[:12]


def read_json(path: Path) -> Any:
    """None where there is no such file, or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Whole under its name, or not there. What is no finite number becomes null."""
    partial = path.with_name(f".{path.name}.writing-{os.getpid()}")
    partial.write_text(json.dumps(plain(value), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


class Stages:
    """The finished stages in a cell's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Any:
        return read_json(self.folder / f"{name}.json")

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What the stage gave, computed where it is not there yet."""
        found = self[name]
        if found is None:
            write_json(self.folder / f"{name}.json", compute())
            found = self[name]
        return found
