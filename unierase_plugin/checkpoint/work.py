"""What an unfinished run leaves beside its output folder: the phases that it has finished, texts among them sealed."""

from __future__ import annotations

import base64
import hashlib
import secrets
import shutil
from pathlib import Path

from ..errors import CheckpointError
from ..storage.cache import Store
from ..storage.inputs import absolute_path

#: Bytes of the random number that makes two seals of one text differ.
NONCE = 16


def work_folder(out: str | Path, run_key: str) -> Store:
    """Where the finished phases of an unfinished run are kept: `.<name>.work` beside the output folder."""
    return Store(_work_root(out) / run_key)


def discard_work(out: str | Path) -> None:
    """Removes the finished phases of all unfinished runs into `out`."""
    shutil.rmtree(_work_root(out), ignore_errors=True)


def _work_root(out: str | Path) -> Path:
    target = absolute_path(out, CheckpointError)
    return target.with_name(f".{target.name}.work")


def seal(text: str, secret: str) -> str:
    """The text as only who knows `secret` reads it: the model's answers hold what is to be forgotten.

    A run that goes on has the requests again, so that a digest of them serves as the secret and is written nowhere.
    The stream is SHAKE-256 of the secret and a fresh random number. As with the ledger's hashes, who guesses every
    request to the letter can test the guess. It hides and does not authenticate: `unseal` of a damaged text raises or
    gives noise.
    """
    nonce = secrets.token_bytes(NONCE)
    return base64.b64encode(nonce + _mixed(text.encode(), nonce, secret)).decode()


def unseal(sealed: str, secret: str) -> str:
    """The text that `seal` was given; ValueError where the secret is another."""
    raw = base64.b64decode(sealed)
    return _mixed(raw[NONCE:], raw[:NONCE], secret).decode()


def _mixed(data: bytes, nonce: bytes, secret: str) -> bytes:
    stream = hashlib.shake_256(nonce + secret.encode()).digest(len(data))
    return bytes(left ^ right for left, right in zip(data, stream, strict=True))
