"""Starts a cell in a process of its own and waits for it."""

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

#: Signals that somebody sends who wants the whole comparison to stop, rather than one method that fails.
OUTSIDE = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM") if hasattr(signal, name))

#: Runs the cell in a folder; what it leaves there is the result.
Launcher = Callable[[Path, Path, Progress], None]


def in_a_process(folder: Path, cache: Path, progress: Progress) -> None:
    """Runs the cell; a process that does not live to say why it failed is a failure that says how it ended.

    cache: folder of what methods keep for later runs, so that a method's time has no part of another's work in it.
    Raises WriteError where the cell cannot write.
    """
    environment = {**os.environ, "UNIERASE_CACHE": str(cache)}
    with (
        (folder / LOG).open("a", encoding="utf-8") as log,
        subprocess.Popen(
            [sys.executable, "-m", "unierase_plugin.compare.cell", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            refused = [note for line in process.stdout if (note := _forward(line, progress))]
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if refused:
        raise WriteError(refused[-1])
    if -code in OUTSIDE:
        raise UniEraseError(
            f"The process of {folder.name} was ended by signal {-code}. What it finished is kept: the same command "
            "goes on from there."
        )
    if not (folder / FAILED).exists() and not Stages(folder).are_done:
        ended = f"by signal {-code}" if code < 0 else f"with status {code}"
        hint = "; 9 is what a system sends that has run out of memory" if code == -9 else ""
        write_json(folder / FAILED, {"kind": "ended", "error": f"The process ended {ended}{hint}.", "ours": False})


def _forward(line: str, progress: Progress) -> str:
    """Tells the progress; returns why the cell cannot write, where it says so."""
    try:
        phase, share, note = json.loads(line)
        if phase == CANNOT_WRITE:
            return str(note)
        progress(str(phase), float(share), str(note))
    except (ValueError, TypeError):
        # Other packages write to standard output too.
        pass
    return ""
