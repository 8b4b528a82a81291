"""Files and folders that are whole or absent: written under another name, synced, and renamed.

A killed process leaves at most a hidden `.<name>.writing-<pid>`. The next process removes it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import CheckpointError, WriteError
from .fingerprints import plain

logger = logging.getLogger(__name__)


@contextmanager
def whole_file(path: Path, needed: int = 0) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to. At the end of the `with` block the file replaces `path`.

    The file is synced before, so under its name it is whole or absent. Files that killed writers of `path` left are
    removed. `needed`: the size in bytes, for the message. Raises WriteError if the disk is full or the folder is not
    writable; the old file is then unchanged.
    """
    partial = path.with_name(f".{path.name}.writing-{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync_folder(path.parent)
        clear_strays(path.parent, path.name, busy=True)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _cannot_write(path, needed, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all (`whole_file`)."""
    with whole_file(path, len(data)) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all (`whole_file`)."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON (`plain`), whole or not at all (`whole_file`). NaN and infinity become null."""
    write_text(path, json.dumps(plain(value), ensure_ascii=False, indent=1) + "\n")


@contextmanager
def replace_folder(folder: Path, needed: int, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Gives an empty folder to fill. At the end of the `with` block it replaces `folder`.

    On any error the new folder is removed and `folder` is unchanged. `needed`: the size in bytes of what is written.
    `check` is called before the exchange; it raises to prevent it. An OSError becomes a CheckpointError that says how
    much room there is.
    """
    folder = Path(folder).expanduser().resolve()
    staging = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        clear_leftovers(folder)
        staging.mkdir(parents=True)
        if shutil.disk_usage(staging).free < needed:
            raise OSError("the disk has too little room")
        yield staging
        sync_tree(staging)
        check()
        _swap_in(staging, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _cannot_write(folder, needed, error) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _swap_in(staging: Path, folder: Path) -> None:
    """Two renames. If the second fails, the first is undone. If a kill comes between them, the next run repairs it."""
    aside = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    try:
        if folder.exists():
            os.rename(folder, aside)
        os.rename(staging, folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
        raise
    try:
        _sync_folder(folder.parent)
    finally:
        _discard(aside)


def clear_leftovers(folder: Path) -> None:
    """Removes what ended processes left beside `folder`, or puts it back if it is the only whole version.

    A leftover with this process's own number is from an earlier process: in a container, every run may have the same
    number.
    """
    folder = Path(folder).expanduser().resolve()
    for purpose in ("replaced", "writing"):
        for leftover, pid in _leftovers(folder.parent, folder.name, purpose):
            if not _is_gone(pid):
                continue
            if purpose == "replaced" and not folder.exists():
                os.rename(leftover, folder)
            else:
                _discard(leftover)


def remove_folder(folder: Path) -> None:
    """Removes a folder, if there is one. After a kill it is whole, or has a name that `clear_strays` knows."""
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    _discard(aside)
    with suppress(OSError):
        os.rename(folder, aside)
        _discard(aside)


def _discard(path: Path) -> None:
    """Removes a file or folder as far as that is possible. A stop in between takes effect once it is gone."""
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path, ignore_errors=True)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
    else:
        with suppress(OSError):
            path.unlink()


def clear_strays(folder: Path, name: str = "", *, busy: bool = False) -> None:
    """Removes what ended processes left half written in `folder`, for one entry `name` or, if empty, for all.

    busy: this process may be writing there in another thread. If not, a leftover with its own number is from an earlier
    process, as in `clear_leftovers`.
    """
    for stray, pid in _leftovers(folder, name, "writing"):
        if _is_gone(pid, busy):
            _discard(stray)


def make_folder(folder: Path) -> Path:
    """The folder as an absolute path, created if needed.

    Raises CheckpointError if it is a file, and WriteError if it cannot be created.
    """
    target = folder.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{str(target)!r} is a file. Give the name of a folder. It is created if needed.")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(target, 0, error) from error
    return target


def make_private(folder: Path) -> None:
    """Creates the folder if needed, and closes it to all but its owner. Windows has no such mode.

    Raises WriteError if it cannot be created or closed.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise _cannot_write(folder, 0, error) from error


def _leftovers(parent: Path, name: str, purpose: str) -> list[tuple[Path, int]]:
    """Hidden entries `.<name>.<purpose>-<pid>` with their process number; of any name if `name` is empty."""
    pattern = re.compile(rf"\.{re.escape(name) if name else '.+'}\.{purpose}-(\d+)(?:-\d+)?")
    with suppress(OSError):
        matches = [(entry, pattern.fullmatch(entry.name)) for entry in parent.iterdir()]
        return [(entry, int(match[1])) for entry, match in matches if match]
    return []


def _is_gone(pid: int, busy: bool = False) -> bool:
    """Whether a leftover's process has ended. This process's own number counts as ended unless it is `busy` there."""
    return not _is_running(pid) or (pid == os.getpid() and not busy)


def _is_running(pid: int) -> bool:
    # On Windows, os.kill with signal 0 does not ask: it would end the process.
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs a folder and all its files to the disk, before the folder gets its name."""
    entries = sorted(folder.rglob("*"))
    for file in (entry for entry in entries if entry.is_file()):
        _sync(file)
    for subfolder in (entry for entry in (*entries, folder) if entry.is_dir()):
        _sync_folder(subfolder)


def _sync_folder(path: Path) -> None:
    # Several network file systems, and Windows, cannot sync a folder. The rename itself is still atomic there.
    with suppress(OSError):
        _sync(path)


def _cannot_write(path: Path, needed: int, error: Exception) -> WriteError:
    """The free space is measured after the partial output is removed, so it is what a second try would find."""
    place, free = _free(path)
    return WriteError(
        f"{str(path)!r} could not be written ({error}); what was there before is unchanged. It needs about "
        f"{_size(needed)}, and {_size(free)} are free in {str(place)!r}. Free some room, or choose another place."
    )


def check_disk_space(path: Path, needed: int) -> None:
    """Raises WriteError if the disk of `path` has fewer than `needed` bytes free.

    The present size of `path` does not count: the old state stays until the new one is whole.
    """
    place, free = _free(path.expanduser().absolute())
    if free < needed:
        raise WriteError(
            f"{str(path)!r} needs about {_size(needed)}, and {_size(free)} are free in {str(place)!r}. Free some room, "
            "or choose another place. Nothing was done yet."
        )


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full, or a quota used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def _free(path: Path) -> tuple[Path, int]:
    """The nearest existing folder above `path`, and its free bytes."""
    place = next((parent for parent in path.parents if parent.exists()), Path.cwd())
    return place, shutil.disk_usage(place).free


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
