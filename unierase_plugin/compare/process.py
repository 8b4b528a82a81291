"""The process of one method's run: `python -m unierase_plugin.compare.process FOLDER`.

A process of its own has its own peak of memory, and ends alone if memory runs out. It writes its progress to standard
output, one line of JSON each. It ends when its standard input does, so that it does not outlive its parent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from ..errors import WriteError
from ..storage.locks import folder_lock
from .method_run import run_method
from .stages import CANNOT_WRITE

#: Seconds to wait for a process that was started before in the same folder.
PATIENCE = 120.0


def main(folder: str) -> None:
    """Runs the method of a folder, and writes its progress to standard output."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start = time.monotonic()
    try:
        # An earlier process may still be about to end, if its parent was killed.
        with folder_lock(Path(folder), PATIENCE):
            run_method(Path(folder), _tell)
    except WriteError as error:
        _tell(CANNOT_WRITE, 0.0, str(error))
        raise SystemExit(1) from None
    _tell("cell", 1.0, f"{time.monotonic() - start:.0f} s")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(3)


def _tell(phase: str, share: float, note: str = "") -> None:
    sys.stdout.write(json.dumps([phase, share, note]) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
