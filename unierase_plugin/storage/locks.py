"""One run at a time into a folder: a lock file beside it. The system releases the lock however the process ends.

The lock is advisory: only runs of this package respect it. The file `.<name>.lock` says who has the lock. What counts
is the system's lock on that file, so the file of a dead process is no obstacle.
"""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

#: Seconds between two looks at a lock of another process, and seconds that the other has to write its name.
POLL, TELLING = 0.05, 1.0
#: How often a lock file is opened again because its former holder removed it in the meantime.
TRIES = 100
#: The errors of a file system without locks.
_UNKNOWN = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}


@contextmanager
def folder_lock(folder: Path, patience: float = 0.0) -> Iterator[Callable[[], None]]:
    """Holds the lock of `folder` for the `with` block. The folder need not exist; missing parents are created.

    patience  seconds to wait for another process

    Yields a function that raises CheckpointError if another process got the lock after all, because somebody deleted
    the lock file.

    Raises CheckpointError with the other process's number and start time if the lock is held, also by this process, and
    if the lock file cannot be created. On a file system without locks there is a warning and no protection.
    """
    path = folder.with_name(f".{folder.name}.lock")
    made = [place for place in path.parents if not place.exists()]
    owner = os.getpid()
    descriptor: int | None = None
    try:
        descriptor = held = _held(path, folder, time.monotonic() + patience)

        def check() -> None:
            if held is not None and path.exists() and not _is_at(held, path):
                raise _taken(path, folder)

        yield check
    finally:
        if os.getpid() == owner:  # a forked child must not release its parent's lock
            if descriptor is not None:
                _give_back(path, descriptor)
            for place in made:
                with suppress(OSError):
                    place.rmdir()


def _held(path: Path, folder: Path, until: float) -> int | None:
    """A descriptor with the lock; None if there are no locks."""
    try:
        for _ in range(TRIES):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except FileNotFoundError:  # the former holder may also remove the parents that it created
                path.parent.mkdir(parents=True, exist_ok=True)
                continue
            if _locked(descriptor, path, until):
                # The former holder may have removed the file in between: a lock on it would protect nothing.
                if _is_at(descriptor, path):
                    _sign(descriptor)
                    return descriptor
                os.close(descriptor)
                continue
            os.close(descriptor)
            raise _taken(path, folder)
    except OSError as error:
        if error.errno in _UNKNOWN:
            logger.warning("The file system of %s has no locks: nothing prevents two runs in it at once.", str(folder))
            path.unlink(missing_ok=True)
            return None
        raise CheckpointError(
            f"The lock file {str(path)!r} cannot be made ({error}). Choose an output folder elsewhere."
        ) from error
    raise _taken(path, folder)


def _locked(descriptor: int, path: Path, until: float) -> bool:
    try:
        while not _try_lock(descriptor):
            if time.monotonic() >= until:
                return False
            time.sleep(POLL)
    except BaseException:
        os.close(descriptor)
        raise
    return True


if sys.platform == "win32":
    import msvcrt

    #: Beyond the text: others cannot read the locked bytes.
    _FAR = 1 << 20

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in _HELD:
                return False
            raise
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            raise
        return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    started = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
    with suppress(OSError):  # the lock holds without the file
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, text.encode())


def _give_back(path: Path, descriptor: int) -> None:
    if os.name == "nt":  # no file that is open goes there
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        return
    with suppress(OSError):
        if _is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)


def _taken(path: Path, folder: Path) -> CheckpointError:
    signed, until = _signature(path), time.monotonic() + TELLING
    while signed is None and time.monotonic() < until:
        time.sleep(POLL)
        signed = _signature(path)
    if signed is None:
        who = "another run"
    elif signed["pid"] == os.getpid() and signed["host"] == socket.gethostname():
        who = f"this very process ({signed['pid']}), since {signed['started']}"
    else:
        who = f"another run: process {signed['pid']} on {signed['host']}, since {signed['started']}"
    return CheckpointError(
        f"The folder {str(folder)!r} is being written by {who}. Wait until that has ended, or choose another folder."
    )


def _signature(path: Path) -> dict[str, Any] | None:
    try:
        signed = json.loads(path.read_text(encoding="utf-8"))
        return {"pid": int(signed["pid"]), "host": str(signed["host"]), "started": str(signed["started"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
