"""Counts what a process does to the files under a folder, and lets something go wrong at one of these operations.

The names come from Python's audit events, so that no writer is missed: opening for writing, rename, remove, mkdir,
rmdir, locks. fsync and safetensors' own writer raise none and are wrapped. The count is shared with forked processes.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

#: Status of a process that was killed here, as a shell reports SIGKILL.
KILLED = 137
#: kill: the process ends before the operation. tear: it ends half way through what the operation writes. full: from the
#: operation on nothing more can be written. stop: SIGTERM before the operation. limit: no file may be larger than `at`
#: bytes, which writers in other languages than Python meet too. pause: it waits until a process beside it has ended.
FAULTS = ("kill", "tear", "full", "stop", "limit", "pause")
#: Seconds of a pause at most.
PATIENCE = 120
#: Operations that write something, so that they can be torn.
WRITING = ("open", "save")
#: Operations that a full disk refuses. A file of no length can still be made, so that `open` fails at its first write.
NEED_ROOM = ("mkdir", "os.mkdir", "fsync")

_EVENTS = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.link": (0, 1),
    "os.symlink": (0, 1),
    "os.truncate": (0,),
    "fcntl.flock": (),
    "fcntl.lockf": (),
}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def ended_beside(log: Path) -> Path:
    """The file that says that a process beside the one with this log has ended."""
    return log.with_suffix(".ended")


class Operations:
    """Installed once in a process that is about to run a command; it cannot be taken out again."""

    def __init__(self, root: Path, kind: str, at: int, log: Path) -> None:
        self.root, self.kind, self.at = str(root), kind, at
        self.others_ended = ended_beside(log)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.count = mmap.mmap(-1, 8)
        self.active, self.torn, self.write = True, False, os.write

    def install(self) -> None:
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.at, self.at))
        real_open, real_sync, real_save = io.open, os.fsync, safetensors.torch.serialize_file  # type: ignore[attr-defined]

        def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            found = real_open(file, mode, *args, **options)
            short = self.torn or (self._is_full() and self._inside(file))
            return _Short(found, self) if short and set(mode) & set("wax+") else found

        def written(descriptor: int, data: Any) -> int:
            if (self.torn or self._is_full()) and self._inside(_path(descriptor)):
                self.write(descriptor, data[: len(data) // 2])
                self.tear()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.write(descriptor, data)

        def synced(descriptor: int) -> None:
            self._happens("fsync", [f"/proc/self/fd/{descriptor}"])
            real_sync(descriptor)

        def saved(tensors: Any, filename: Any, metadata: Any = None) -> None:
            inside = self._inside(filename)
            if inside:
                self._happens("save", [filename])
            self.active = False
            try:
                real_save(tensors, filename, metadata)
                if inside and (self.torn or self._is_full()):
                    os.truncate(filename, os.path.getsize(filename) // 2)
                    self.tear()
                    raise SafetensorError("I/O error: No space left on device (os error 28)")
            finally:
                self.active = True

        io.open = builtins.open = opened
        os.fsync, os.write = synced, written  # type: ignore[assignment]
        safetensors.torch.serialize_file = saved  # type: ignore[assignment, attr-defined]
        # A copy by the kernel goes past what is wrapped here.
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
        sys.addaudithook(self._heard)

    def tear(self) -> None:
        if self.torn:
            os._exit(KILLED)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, flags = args
            writes = bool(set(mode) & set("wax+")) if isinstance(mode, str) else bool((flags or 0) & _WRITE_FLAGS)
            if writes and self._inside(path):
                self._happens("open", [path])
        elif event in _EVENTS:
            paths = [_path(args[place]) for place in _EVENTS[event]]
            # A path relative to an open folder, as shutil.rmtree gives it, cannot be told, and is never elsewhere.
            if not paths or any(self._inside(path) or not os.path.isabs(os.fspath(path)) for path in paths):
                self._happens(event, paths)

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return False
        path = os.fsdecode(path)
        whole = os.path.realpath(path) if path.startswith("/proc/self/fd/") else os.path.abspath(path)
        return whole.startswith(self.root)  # type: ignore[no-any-return]

    def _happens(self, name: str, paths: list[Any]) -> None:
        number = int.from_bytes(self.count[:8], "little") + 1
        self.count[:8] = number.to_bytes(8, "little")
        self.active = False
        try:
            told = [os.path.relpath(os.path.realpath(os.fsdecode(path)), self.root) for path in paths]
            with suppress(OSError):
                self.write(self.log, (json.dumps({"at": number, "operation": name, "paths": told}) + "\n").encode())
        finally:
            self.active = True
        if number == self.at and self.kind != "limit":
            if self.kind == "kill":
                os._exit(KILLED)
            if self.kind == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            if self.kind == "pause":
                end = time.monotonic() + PATIENCE
                while not self.others_ended.exists() and time.monotonic() < end:
                    time.sleep(0.01)
            if self.kind == "tear":
                self.torn = True
                if name not in WRITING:
                    self.tear()
        if self._is_full() and name in NEED_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_full(self) -> bool:
        return self.kind == "full" and int.from_bytes(self.count[:8], "little") >= self.at


def _path(named: Any) -> Any:
    """Of a descriptor too."""
    return f"/proc/self/fd/{named}" if isinstance(named, int) else named


class _Short:
    """A file whose first write stops half way."""

    def __init__(self, file: Any, operations: Operations) -> None:
        self._file, self._operations = file, operations

    def write(self, data: Any) -> int:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._operations.tear()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _Short:
        return self

    def __exit__(self, *reason: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
