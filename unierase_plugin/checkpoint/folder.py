"""Writes an output folder: the model, and the record with one more step."""

from __future__ import annotations

import logging
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..facts.request import ForgetRequest
from ..hparams import HyperParams
from ..locate_then_edit.edit import WeightEdit
from ..locate_then_edit.targets import forms_of
from ..models.stored_dtype import as_stored, stored_dtype
from ..models.tying import is_tied, settled_config
from ..storage.fingerprints import digest, model_fingerprint, plain
from ..unlearning_token import UnlearningToken
from .companions import carry_companions
from .older_transformers import write_for_older_transformers
from .originals import Originals
from .place import OutputFolder, held
from .readback import check_written
from .record import RECORD, SCHEMA, Checkpoint, ledger_hash, pack_checkpoint, write_record

#: Keys that the caller must give in `manifest_extra`, since the model in memory does not tell them.
REQUIRED_EXTRA = ("method", "model", "model_fingerprint_before", "created")
#: Settings of generation that have an effect only with do_sample.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: str | Path | OutputFolder,
    *,
    model: Any,
    tokenizer: Any,
    token: UnlearningToken | None,
    edit: WeightEdit | None,
    originals: Originals | None,
    requests: Sequence[ForgetRequest],
    hparams: HyperParams,
    manifest_extra: Mapping[str, Any],
    report: Mapping[str, Any],
    overwrite: bool = False,
    keep_requests: bool = False,
    earlier: Checkpoint | None = None,
    step_inputs: Sequence[Any] = (),
) -> Path:
    """Writes the edited model with its record. The folder appears whole or not at all; an old one stays until then.

    manifest_extra must hold REQUIRED_EXTRA and may hold more. `earlier` is the checkpoint that this run continued: its
    steps, ledger and originals are carried over. `originals` may be None for a method that cannot be reverted.
    `step_inputs` distinguishes this step from any other (`step_id`). Raises CheckpointError if the folder is not free
    (`output_folder`) or cannot be written.
    """
    missing = [name for name in REQUIRED_EXTRA if name not in manifest_extra]
    if missing:
        raise CheckpointError(f"manifest_extra lacks {', '.join(missing)}; it needs {', '.join(REQUIRED_EXTRA)}.")
    stored = None if originals is None else originals.in_dtype(stored_dtype(model))
    kept = _merge_originals(stored, earlier)
    edits = (*(earlier.edits if earlier else ()), *([edit] if edit else ()))
    with as_stored(model):
        manifest = _manifest(
            model, tokenizer, token, kept, requests, hparams, manifest_extra, edit, earlier, step_inputs
        )
        size = bytes_of(model.parameters())
    forms = forms_of(tokenizer, hparams)
    added = _ledger(requests, len(manifest["steps"]), manifest["salt"], forms, edit, keep_requests)
    lines = [*(earlier.ledger if earlier else ()), *added]
    checkpoint = Checkpoint(
        manifest=manifest,
        token=token,
        edits=edits,
        originals=kept,
        ledger=lines,
        report=report,
        earlier_reports=earlier.reports if earlier else {},
    )
    needed = size + bytes_of(pack_checkpoint(checkpoint)[0].values())
    with held(folder, overwrite) as place, as_stored(model), place.filled(needed) as staging:
        save_model(model, staging)
        tokenizer.save_pretrained(staging)
        write_for_older_transformers(staging)
        write_record(checkpoint, staging / RECORD)
        carry_companions([str(manifest_extra["model"]), *_loaded_from(model)], staging, place.path)
        check_written(staging, model)
    return place.path


def step_id(salt: str, inputs: Sequence[Any]) -> str:
    """Identifies a step: a digest of its inputs, with the same salt as the ledger's hashes."""
    return digest(salt, list(inputs))


def _merge_originals(new: Originals | None, earlier: Checkpoint | None) -> Originals | None:
    """Originals of the first state. Those of an earlier step win, since the new step saw weights that it had edited.

    None if any step kept none: its changes cannot be reverted.
    """
    if earlier is None:
        return new
    old = earlier.originals
    if new is None or old is None:
        return None
    return old.before(new)


def _manifest(
    model: Any,
    tokenizer: Any,
    token: UnlearningToken | None,
    originals: Originals | None,
    requests: Sequence[ForgetRequest],
    hparams: HyperParams,
    extra: Mapping[str, Any],
    edit: WeightEdit | None,
    earlier: Checkpoint | None,
    step_inputs: Sequence[Any],
) -> dict[str, Any]:
    settings = plain(hparams.as_dict())
    layers = list(edit.layers) if edit else []
    after = model_fingerprint(model)
    # It prevents a search for a hash that was seen elsewhere. Whoever has the folder can still test a guess.
    salt = earlier.manifest["salt"] if earlier else secrets.token_hex(16)
    step = {
        "method": extra["method"],
        "created": extra["created"],
        "layers": layers,
        "requests": len(requests),
        "taken_back": 0,
        "model_fingerprint_after": after,
        "hparams": settings,
        **({"id": step_id(salt, step_inputs)} if step_inputs else {}),
    }
    before = earlier.manifest if earlier else extra
    return {
        **plain(extra),
        "schema": SCHEMA,
        "model": str(before["model"]),
        "model_fingerprint_before": before["model_fingerprint_before"],
        "tokenizer_fingerprint_before": before.get("tokenizer_fingerprint_before"),
        "working_fingerprint_before": before.get("working_fingerprint_before"),
        "model_fingerprint_after": after,
        "hparams": settings,
        "seed": settings.get("seed"),
        "versions": _versions(),
        "token": _token_entry(model, token, originals),
        "tokenizer_length_before": len(tokenizer) - (token is not None),
        "tied": is_tied(model),
        "layers": sorted({*layers, *(earlier.manifest["layers"] if earlier else ())}),
        "weights": {str(layer): name for layer, name in originals.names.items()} if originals else {},
        "salt": salt,
        "steps": [*(earlier.manifest["steps"] if earlier else ()), step],
    }


def _token_entry(model: Any, token: UnlearningToken | None, originals: Originals | None) -> dict[str, Any] | None:
    if token is None:
        return None
    before = originals.vocabulary if originals else None
    rows = model.get_input_embeddings().weight.shape[0]
    return {
        "name": token.name,
        "id": token.id,
        "vocabulary_before": before,
        "rows_added": before is not None and rows > before,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "unierase-plugin"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            found[name.replace("-", "_")] = "unknown"
    return found


def _ledger(
    requests: Sequence[ForgetRequest],
    step: int,
    salt: str,
    forms: Sequence[str],
    edit: WeightEdit | None,
    in_the_clear: bool,
) -> Iterator[dict[str, Any]]:
    """Answer and subject are hashed with their question, so a list of names or of short answers matches nothing."""
    # A removal is made for all requests together, so no column belongs to one of them.
    rank = edit.rank(edit.layers[0]) if edit and edit.layers and not edit.removed else 0
    # The edit has the requests in order, with all columns of a request together (`targets.make_targets`).
    width, odd = divmod(rank, max(1, len(requests)))
    for at, request in enumerate(requests):
        texts = {"answer": request.answer, "subject": request.subject}
        yield {
            "step": step,
            "columns": list(range(at * width, (at + 1) * width)) if width and not odd else None,
            "forms": list(forms),
            "case_id_sha256": None if request.case_id is None else ledger_hash(salt, request.case_id),
            "question_sha256": ledger_hash(salt, request.question),
            **{
                f"{name}_sha256": None if text is None else ledger_hash(salt, request.question, text)
                for name, text in texts.items()
            },
            **({"case_id": request.case_id, "question": request.question, **texts} if in_the_clear else {}),
        }


def save_plain(
    folder: str | Path | OutputFolder,
    model: Any,
    tokenizer: Any,
    notes: Mapping[str, str],
    overwrite: bool = False,
    models: Sequence[str] = (),
) -> Path:
    """Writes a model folder without a record, and `notes` as text files by name. It appears whole or not at all.

    models: further models whose licences apply, beside the one that the model was loaded from.
    """
    with held(folder, overwrite) as place, as_stored(model), place.filled(bytes_of(model.parameters())) as staging:
        save_model(model, staging)
        tokenizer.save_pretrained(staging)
        write_for_older_transformers(staging)
        for name, text in notes.items():
            (staging / name).write_text(text, encoding="utf-8")
        carry_companions([*models, *_loaded_from(model)], staging, place.path)
        check_written(staging, model)
    return place.path


def _loaded_from(model: Any) -> list[str]:
    """The folder or hub id that a model was loaded from; for a merged adapter, that of its base."""
    name = getattr(model.config, "_name_or_path", "")
    return [name] if isinstance(name, str) and name else []


def save_model(model: Any, folder: Path, tell: bool = True) -> None:
    """Writes weights and configuration, whatever sampling settings a published model has. Tying stays as in the model.

    tell: whether a warning names the settings that are left out.
    """
    with _valid_generation_config(model, tell), settled_config(model):
        model.save_pretrained(folder)


@contextmanager
def _valid_generation_config(model: Any, tell: bool) -> Iterator[None]:
    """Leaves sampling settings without do_sample out of the saved copy. Under greedy decoding they have no effect.

    Published models have such settings, and transformers refuses to save them.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _is_valid(config):
        yield
        return
    repaired, default = deepcopy(config), type(config)()
    for name in SAMPLING:
        if hasattr(repaired, name):
            setattr(repaired, name, getattr(default, name))
    left_out = [name for name in SAMPLING if getattr(config, name, None) != getattr(repaired, name, None)]
    if tell and left_out:
        logger.warning(
            "generation_config.json is written without %s, which the model's own file sets without do_sample. "
            "transformers refuses to save this, and greedy decoding does not read it.",
            ", ".join(left_out),
        )
    model.generation_config = repaired
    try:
        yield
    finally:
        model.generation_config = config


def _is_valid(generation_config: Any) -> bool:
    try:
        generation_config.validate(strict=True)
    except ValueError:
        return False
    return True


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Size of the tensors in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
