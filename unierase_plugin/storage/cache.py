"""The cache on disk: a `Store` keeps each result in one safetensors file.

Statistics, tokens and values are expensive and reusable. A result's key is a digest of everything that it depends on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ..errors import CheckpointError, shown
from .atomic import clear_strays, logger, make_private
from .inputs import checked_path
from .tensor_files import Packed, pack, read_tensors, unpack, write_tensors

R = TypeVar("R")

#: Marks a warning as one of several. A command line shows them in one line (`cli.console.our_log`).
ONE_OF_NOT_KEPT = {"one_of": "results were not kept for later runs"}
ONE_OF_DAMAGED = {"one_of": "damaged files of the cache were computed again"}


def cache_folder(explicit: str = "") -> Path:
    """The folder for reusable results: `explicit`, else UNIERASE_CACHE, XDG_CACHE_HOME/unierase, or ~/.cache/unierase.

    Raises CheckpointError if no folder can be there: a file is in the way, or the home folder is unknown.
    """
    chosen = explicit or os.environ.get("UNIERASE_CACHE", "")
    base = os.environ.get("XDG_CACHE_HOME", "")
    place = Path(chosen) if chosen else (Path(base) if base else _home() / ".cache") / "unierase"
    found = checked_path(place, CheckpointError, "cache folder")
    there = next((each for each in (found, *found.parents) if each.exists()), found)
    if there.exists() and not there.is_dir():
        raise CheckpointError(
            f"The cache folder {shown(str(found))} cannot be made: {shown(str(there))} is a file. "
            "Set UNIERASE_CACHE (or the setting stats_dir) to a folder."
        )
    return found


def _home() -> Path:
    with suppress(RuntimeError):
        home = Path.home()
        # An empty HOME would mean the root of the file system.
        if os.environ.get("HOME") != "" and home.is_absolute():
            return home
    raise CheckpointError(
        "There is no place for the cache: the home folder is not known (HOME is not set). Set UNIERASE_CACHE, or HOME, "
        "to a folder."
    )


class Store:
    """A folder of results by kind and key: `<root>/<kind>/<key>.safetensors`.

    The cache speeds up a run and never ends one. A result that cannot be read counts as absent. A result that cannot be
    written is dropped. Both give a warning in the log.
    """

    def __init__(self, root: Path, private: bool = False) -> None:
        """private: the folder is for its owner alone (mode 0700), since what it holds is not for others to read."""
        self.root, self.private = Path(root), private

    def path(self, kind: str, key: str) -> Path:
        for part in (kind, key):
            if not re.fullmatch(r"\w[\w.+-]*", part):
                raise CheckpointError(
                    f"{part!r} cannot be part of a file name. Use a digest, or letters, digits and '._+-'."
                )
        return self.root / kind / f"{key}.safetensors"

    def get(self, kind: str, key: str) -> Packed | None:
        path = self.path(kind, key)
        if not path.is_file():
            return None
        try:
            return read_tensors(path)
        except CheckpointError as error:
            logger.warning("Computing again: %s", error, extra=ONE_OF_DAMAGED)
            return None

    def cached(self, kind: str, key: str, compute: Callable[[], Packed]) -> Packed:
        """The result under this key. If there is none, the result of `compute`, which is then kept."""
        found = self.get(kind, key)
        if found is None:
            found = compute()
            self.put(kind, key, *found)
        return found

    def record(self, record: type[R], kind: str, key: str, compute: Callable[[], R]) -> R:
        """The same for a dataclass. It is read back in any case, so that a cold run gives what a warm one does."""
        return unpack(record, *self.cached(kind, key, lambda: pack(compute())))

    def put(self, kind: str, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        path = self.path(kind, key)
        try:
            if self.private:
                make_private(self.root)
            write_tensors(path, tensors, metadata)
        except CheckpointError as error:
            logger.warning("Not kept for later runs: %s", error, extra=ONE_OF_NOT_KEPT)
            return
        clear_strays(path.parent, busy=True)
