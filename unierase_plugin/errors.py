"""The exceptions of the package, under one base class, and the hint they share.

Every message quotes the value that was refused, what would have been accepted and what to do about it, so that catching
`UniEraseError` and printing it is enough for a command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UniEraseError(Exception):
    """Base of every error that the package raises on purpose."""


class RequestError(UniEraseError):
    """A forget request, a set of them, or the file or name that they are read from is not usable."""


class HyperParamsError(UniEraseError):
    """A hyper-parameter is unknown, has the wrong type or lies outside its range."""


class ArchitectureError(UniEraseError):
    """The model lacks a part that the method needs, or the part is not where its structure says it should be."""


class TokenError(UniEraseError):
    """The unlearning token cannot be added, is not exactly one token, or was not learned."""


class EditError(UniEraseError):
    """A weight edit cannot be computed, applied or reverted."""


class TrainingError(UniEraseError):
    """Training diverged, or the memory does not hold it."""


class CheckpointError(UniEraseError):
    """An output folder is incomplete, does not match its manifest, or belongs to another model."""


class WriteError(CheckpointError):
    """A file or folder cannot be written: the disk is full, or the place does not allow it. The old state is there."""


class DependencyError(UniEraseError):
    """A package that this feature needs is not installed, or its version does not fit."""


class PluginError(UniEraseError):
    """A method, reader, metric or host is not there, or two plugins claim its name."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `" Did you mean 'layers'?"`, or `""` when no known name is close.

    The leading space lets a message append the hint without asking whether there is one. Case is ignored, so that
    `Layers` finds `layers`.
    """
    by_folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""
