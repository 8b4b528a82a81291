"""Where the audited models come from: the edited one, the unedited one, and one that never knew the facts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, is_whole, revert_checkpoint
from ..errors import CheckpointError, UniEraseError, WriteError, reason, shown
from ..models.loading import read_tokenizer
from ..session import open_model, record_of
from ..storage.atomic import remove_folder
from ..storage.inputs import no_folder
from .contract import EDITED, REFERENCE, UNEDITED, Audited

#: The unedited model is taken back into this folder of the output. Its fingerprint is part of the name, since a stopped
#: audit may have left the folder of another model.
REBUILT = "unedited"
#: Digits of the fingerprint in its name.
FINGERPRINT = 12

#: A folder or hub id, or a pair of a loaded model and its tokenizer.
Source = str | os.PathLike[str] | tuple[Any, Any]


@dataclass(frozen=True)
class Sources:
    """Where each model comes from."""

    edited: Source
    unedited: Source
    reference: Source | None
    record: Checkpoint | None
    #: How the unedited model was found, in words.
    how: str
    #: The folder that it is taken back to; None if it need not be taken back.
    rebuilt: Path | None = None

    def source(self, role: str) -> Source | None:
        return {EDITED: self.edited, UNEDITED: self.unedited, REFERENCE: self.reference}[role]

    def name(self, role: str) -> str:
        return _named(self.source(role))


def _named(source: Source | None) -> str:
    return "a model at hand" if isinstance(source, tuple) else str(source)


def find_sources(model: Source, base: Source | None, reference: Source | None, target: Path) -> Sources:
    """Finds the unedited model: the one that is given, else the one that the edited folder's record leads to.

    target: the output folder. Raises UniEraseError if no unedited model is known.
    """
    record = None if isinstance(model, tuple) else record_of(model)
    name = _named(model)
    if base is not None:
        return Sources(edited=model, unedited=base, reference=reference, record=record, how="given as --base")
    if record is None:
        missing = "" if isinstance(model, tuple) else no_folder(model)
        raise UniEraseError(
            f"{missing}{name!r} has no record of its edit, so the unedited model is not known. Name it with --base "
            "DIR_OR_ID."
        )
    if record.originals is not None:
        rebuilt = target / f"{REBUILT}-{record.manifest['model_fingerprint_before'][:FINGERPRINT]}"
        return Sources(
            edited=model,
            unedited=rebuilt,
            reference=reference,
            record=record,
            how=f"taken back to the bit from {name}",
            rebuilt=rebuilt,
        )
    return Sources(
        edited=model,
        unedited=str(record.manifest["model"]),
        reference=reference,
        record=record,
        how=f"named in the record of {name}",
    )


def take_back(sources: Sources) -> None:
    """Writes the unedited model if it comes from the record, unless a stopped audit has left it whole."""
    if sources.rebuilt is None or is_whole(sources.rebuilt):
        return
    remove_folder(sources.rebuilt)
    try:
        revert_checkpoint(sources.name(EDITED), sources.rebuilt)
    except WriteError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error} For the audit, name the unedited model with --base DIR_OR_ID.") from error


def open_audited(sources: Sources, role: str, *, token: str, device: str, dtype: str) -> Audited:
    """Loads the model of this role. token: the text of the unlearning token; "" if there is none."""
    source = sources.source(role)
    loaded = open_model(*source) if isinstance(source, tuple) else open_model(str(source), device=device, dtype=dtype)
    return Audited(role, loaded, loaded.tokenizer.get_vocab().get(token) if token else None)


def unlearning_token(record: Checkpoint | None, tokenizer: Any) -> str:
    """The text of the unlearning token, from the record or the tokenizer's added tokens; "" if there is none."""
    if record is not None:
        return record.token.name if record.token else ""
    return min((name for name in tokenizer.get_added_vocab() if re.fullmatch(r"<unlearn_?\d*>", name)), default="")


def tokenizer_of(source: Source) -> Any:
    """The tokenizer of a model, which is not loaded for it. Raises UniEraseError if it cannot be read."""
    if isinstance(source, tuple):
        return source[1]
    try:
        return read_tokenizer(str(source))
    except Exception as error:  # the hub, the file system and the tokenizer each have their own errors
        raise UniEraseError(
            f"No tokenizer can be loaded from {shown(str(source))}. {no_folder(str(source))}Give the folder or hub id "
            f"of a model with its tokenizer ({reason(error)})."
        ) from error


def remove_rebuilt(target: Path) -> None:
    """Removes the unedited models that audits into this folder took back."""
    for rebuilt in target.glob(f"{REBUILT}-{'[0-9a-f]' * FINGERPRINT}"):
        remove_folder(rebuilt)
