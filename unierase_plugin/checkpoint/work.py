"""The finished phases of an unfinished run, which lie beside its output folder."""

from __future__ import annotations

import base64
import hashlib
import shutil
from pathlib import Path

from ..errors import CheckpointError
from ..storage.cache import Store
from ..storage.inputs import absolute_path

#: Bytes of the random number in front of a text that an earlier version hid.
NONCE = 16


def work_folder(out: str | Path, run_key: str) -> Store:
    """The place of an unfinished run's finished phases: `.<name>.work` beside the output folder."""
    return Store(_work_root(out) / run_key, private=True)


def discard_work(out: str | Path) -> None:
    """Removes the finished phases of all unfinished runs into `out`."""
    shutil.rmtree(_work_root(out), ignore_errors=True)


def _work_root(out: str | Path) -> Path:
    target = absolute_path(out, CheckpointError)
    return target.with_name(f".{target.name}.work")


def unseal(sealed: str, secret: str) -> str:
    """The text that an earlier version wrote here. It hid texts instead of closing the folder to others.

    secret: a digest of the requests. Raises ValueError if it is not the right one.
    """
    raw = base64.b64decode(sealed)
    nonce, hidden = raw[:NONCE], raw[NONCE:]
    stream = hashlib.shake_256(nonce + secret.encode()).digest(len(hidden))
    return bytes(left ^ right for left, right in zip(hidden, stream, strict=True)).decode()
