"""Where an output folder may be written: whether another run writes there, what is in the way, what would be lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..facts.readers import spec_path
from ..storage.atomic import clear_leftovers, replace_folder
from ..storage.inputs import absolute_path
from ..storage.locks import folder_lock
from .contents import carry_over, refuse_foreign, write_list
from .integrity import is_edited
from .record import MANIFEST, RECORD


@dataclass(frozen=True)
class OutputFolder:
    """A folder that no other run writes to until the `with` block of `output_folder` ends."""

    path: Path
    overwrite: bool
    #: What the run reads, by the words that a message uses for it.
    inputs: Mapping[str, Path] = field(default_factory=dict)
    #: Whether a new version of the same folder replaces it. The new version keeps foreign files.
    in_place: bool = False
    #: Raises if another run holds it after all.
    check_lock: Callable[[], None] = field(default=lambda: None, repr=False)

    def check(self) -> None:
        """Raises CheckpointError if the folder cannot be written, or if files that no run wrote would be lost."""
        self.check_lock()
        self.check_ground()
        target = self.path
        if not target.is_dir() or not any(target.iterdir()):
            return
        self._refuse_precious()  # first, since --overwrite would not help there
        if not self.overwrite:
            raise CheckpointError(
                f"The output folder {str(target)!r} is not empty. Choose another, or pass --overwrite "
                "(overwrite=True) to replace it."
            )
        if not self.in_place:
            refuse_foreign(target)

    def check_ground(self) -> None:
        """The part of the check that does not ask what the folder holds."""
        target = self.path
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{str(target)!r} is a file. Give the name of a folder. It is created if needed.")
        for place in (target, *target.parents):
            if place.name == RECORD and (place / MANIFEST).is_file():
                raise CheckpointError(f"{str(target)!r} is inside the record of an edit. Choose another output folder.")
        if target.is_dir() and os.path.ismount(target):
            raise CheckpointError(
                f"{str(target)!r} is a mount point and cannot be replaced as a whole. Give a folder in it, such as "
                f"{str(target / 'model')!r}."
            )
        ground = next(parent for parent in target.parents if parent.exists())
        if not os.access(ground, os.W_OK | os.X_OK):
            raise CheckpointError(f"{str(ground)!r} cannot be written to. Choose an output folder elsewhere.")

    @contextmanager
    def filled(self, needed: int) -> Iterator[Path]:
        """Gives an empty folder to fill. At the end of the block it becomes the output folder, or nothing changes.

        Checks again before the exchange. `needed` is the size of the files to be written, in bytes.
        """
        with replace_folder(self.path, needed, self.check) as staging:
            yield staging
            foreign = carry_over(self.path, staging) if self.in_place else ()
            write_list(staging, foreign)

    def _refuse_precious(self) -> None:
        for place in (Path(os.path.expanduser("~")), Path.cwd()):
            if holds(self.path, place):
                raise CheckpointError(
                    f"{str(self.path)!r} is not replaced, since {str(place)!r} is inside it. Choose another output "
                    "folder."
                )
        for what, place in self.inputs.items():
            if holds(self.path, place):
                raise CheckpointError(
                    f"{str(self.path)!r} is not replaced, since it holds {what} that this run reads: {str(place)!r}. "
                    "Choose another output folder."
                )


@contextmanager
def output_folder(
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    inputs: Mapping[str, Any] | None = None,
    going_on: str | os.PathLike[str] | None = None,
) -> Iterator[OutputFolder]:
    """Holds the folder for this run alone during the `with` block, and checks that it may be written.

    inputs    what the run reads, by the words that a message uses for it: folders, files and SPECs; others are left out
    going_on  a folder that the run may replace by its new version if it has a record: otherwise there is no way back

    Raises CheckpointError if another run holds the folder, if it is a file or a mount point, or if it is not empty and
    `overwrite` is not set. Also raises it if something in the folder would be lost: files that this package did not
    write, an input of the run, the home or the working folder.
    """
    target = absolute_path(folder, CheckpointError)
    if not target.name:
        raise CheckpointError(f"{str(target)!r} is no folder for a model. Choose another output folder.")
    OutputFolder(target, overwrite).check_ground()
    with folder_lock(target) as check_lock:
        # First, since a run that was killed during the exchange left the folder under another name.
        clear_leftovers(target)
        in_place = going_on is not None and _same(target, Path(going_on)) and is_edited(target)
        read = _read(inputs or {})
        if in_place:
            read = {what: place for what, place in read.items() if not _same(target, place)}
        claimed = OutputFolder(path=target, overwrite=overwrite, inputs=read, in_place=in_place, check_lock=check_lock)
        claimed.check()
        yield claimed


def _read(inputs: Mapping[str, Any]) -> dict[str, Path]:
    """The inputs that exist, and what is read with them: the base model of an adapter."""
    found = {what: place for what, spec in inputs.items() if (place := spec_path(spec)) is not None}
    bases = {f"the base of {what}": _base_of(place) for what, place in found.items()}
    return {**found, **{what: place for what, place in bases.items() if place is not None}}


def _base_of(adapter: Path) -> Path | None:
    try:
        return spec_path(json.loads((adapter / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def held(folder: str | Path | OutputFolder, overwrite: bool = False) -> AbstractContextManager[OutputFolder]:
    """The folder, held for a `with` block: unchanged if it is held already, else by `output_folder`."""
    return nullcontext(folder) if isinstance(folder, OutputFolder) else output_folder(folder, overwrite)


def check_output_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """The folder as an absolute path, if a checkpoint may be written there now. Raises like `output_folder`."""
    with output_folder(folder, overwrite) as claimed:
        return claimed.path


def holds(folder: Path, place: Path) -> bool:
    """Whether `place` is the folder or is inside it, whatever links and spellings lead there."""
    if not folder.exists():
        return False
    named = os.path.abspath(os.path.expanduser(place))
    found = (Path(named), Path(os.path.realpath(named)))
    return any(_same(folder, each) for path in found for each in (path, *path.parents))


def _same(left: Path, right: Path) -> bool:
    try:
        return os.path.samefile(left, os.path.expanduser(right))
    except (OSError, ValueError):
        return False
