"""A folder to which a command adds results, call by call. One process at a time; other people's files are safe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from .inputs import absolute_path
from .locks import folder_lock


@contextmanager
def results_folder(out: str | os.PathLike[str], written: Sequence[str], ours: Callable[[Path], bool]) -> Iterator[None]:
    """Reserves the folder for this process while the `with` block lasts.

    written  names of the files that are written or replaced there
    ours     whether the folder's files of these names are from an earlier call

    Raises CheckpointError if another process holds the folder, and for a file of such a name that is somebody else's.
    """
    target = absolute_path(out, CheckpointError)
    with folder_lock(target):
        taken = [name for name in written if os.path.lexists(target / name)]
        if taken and not ours(target):
            raise CheckpointError(
                f"{str(target / taken[0])!r} is not an earlier result, and would be replaced. Choose another "
                "output folder."
            )
        yield
