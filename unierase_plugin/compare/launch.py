"""Runs a method in a process of its own and waits for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import UniEraseError, WriteError
from ..methods.contract import Progress
from ..storage.atomic import write_json
from .stages import CANNOT_WRITE, FAILED, LOG, Stages

#: Signals by which somebody stops the whole comparison. Any other signal that ends a process is a failed method.
OUTSIDE = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM") if hasattr(signal, name))

#: Runs the method of a folder. What it leaves there is the result. Takes the folder, a cache folder and the progress.
Launcher = Callable[[Path, Path, Progress], None]


def in_a_process(folder: Path, cache: Path, progress: Progress) -> None:
    """Runs the method. If its process ends without a reason, the failure says how it ended.

    cache: the folder for what methods keep for later runs. With a folder of its own, no method profits from another.
    Raises WriteError if the process cannot write.
    """
    environment = {**os.environ, "UNIERASE_CACHE": str(cache)}
    with (
        (folder / LOG).open("a", encoding="utf-8") as log,
        subprocess.Popen(
            [sys.executable, "-m", "unierase_plugin.compare.process", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process,
    ):
        try:
            refused = [note for line in process.stdout or () if (note := _forward(line, progress))]
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if refused:
        raise WriteError(refused[-1])
    if -code in OUTSIDE:
        raise UniEraseError(
            f"The process of {folder.name} was ended by signal {-code}. Its finished stages are kept. Give the same "
            "command again to continue."
        )
    if not (folder / FAILED).exists() and not Stages(folder).are_done:
        ended = f"by signal {-code}" if code < 0 else f"with status {code}"
        hint = "; a system that runs out of memory sends signal 9" if code == -9 else ""
        write_json(folder / FAILED, {"kind": "ended", "error": f"The process ended {ended}{hint}.", "ours": False})


def _forward(line: str, progress: Progress) -> str:
    """Passes the progress on. Returns why the process cannot write, if it says so."""
    try:
        phase, share, note = json.loads(line)
        if phase == CANNOT_WRITE:
            return str(note)
        progress(str(phase), float(share), str(note))
    except (ValueError, TypeError):
        # Other packages write to standard output too.
        pass
    return ""
