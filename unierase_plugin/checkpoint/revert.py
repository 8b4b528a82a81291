"""Takes an edit back: all of it, the last steps, or single requests."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, first_words
from ..locate_then_edit.edit import WeightEdit, apply_edit
from ..models.architecture import find_architecture
from ..models.disk_space import weights_size
from ..models.loading import open_weights
from ..storage.atomic import check_disk_space
from ..storage.fingerprints import model_fingerprint
from .contents import LIST, changed_contents
from .damage import misfits
from .downdate import edit_without
from .folder import bytes_of, save_model
from .integrity import Examined, WayBack, examine
from .older_transformers import write_for_older_transformers
from .originals import Originals
from .place import OutputFolder, output_folder
from .readback import check_written
from .record import RECORD, Checkpoint, write_record

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
#: Files of a tokenizer that may name an added token.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

#: How far a rebuilt weight may differ from the saved one, in Euclidean norms: this share of the change, plus this share
#: of the weight's own rounding.
ROUNDING_OF_CHANGE, ROUNDING_OF_WEIGHT = 1e-4, 0.03


def revert_checkpoint(folder: str | Path, out: str | Path, overwrite: bool = False, step: int = 0) -> Path:
    """Writes the model as it was after `step` steps to `out`.

    Step 0 gives the base model to the bit, without the token and without a record. A vocabulary that was enlarged for
    the token gets its old size back; a padding row that the token had taken gets its old content back. Later steps give
    a checkpoint that ends there. Raises CheckpointError if the method kept no originals, if a part of the record that
    is needed is damaged, or if the weights in `folder` are not those that the record was written for.
    """
    with output_folder(out, overwrite, inputs={"the edited model": Path(folder)}, going_on=folder) as place:
        check_disk_space(place.path, weights_size(folder))
        return _reverted(examine(folder), place, step)


def _reverted(found: Examined, place: OutputFolder, step: int) -> Path:
    if step == 0:
        return _revert_all(found, place)
    source, checkpoint = found.folder, found.up_to(step)
    originals = _revertible(checkpoint, source, step)
    model = load_saved(source)
    kept = _until(checkpoint, step)
    _check_untouched(model, checkpoint, source)
    _check_fit(model, found, checkpoint, originals)
    _rebuild(model, kept, originals)
    if model_fingerprint(model) != kept.manifest["model_fingerprint_after"]:
        # The factors are multiplied again here. Another processor may round a product differently.
        logger.warning("The weights after step %d are rebuilt up to rounding, not to the bit.", step)
    return _write(model, source, place, "", kept)


def take_back_requests(folder: str | Path, out: str | Path, requests: Sequence[str], overwrite: bool = False) -> Path:
    """Writes to `out` the model as it would be without `requests` in the forget set.

    A request is named by its question, its case_id or the beginning of its hash (`Checkpoint.find`). It is taken out of
    every step that holds it: the closed form of that step is solved again without it, from the stored keys
    (`downdate`). Later steps do not change. If no request is left, the base model is written, to the bit. Raises
    CheckpointError for a request that the ledger does not hold, and like `revert_checkpoint`.
    """
    with output_folder(out, overwrite, inputs={"the edited model": Path(folder)}, going_on=folder) as place:
        check_disk_space(place.path, weights_size(folder))
        return _without(examine(folder), place, requests)


def _without(found: Examined, place: OutputFolder, requests: Sequence[str]) -> Path:
    source, checkpoint = found.folder, found.up_to()
    originals = _revertible(checkpoint, source, 0)
    kept, first = _record_without(checkpoint, requests, source)
    if not kept.manifest["steps"]:
        return _revert_all(found, place)
    model = load_saved(source)
    _check_untouched(model, checkpoint, source)
    _check_fit(model, found, checkpoint, originals)
    after = {step: str(entry["model_fingerprint_after"]) for step, entry in enumerate(kept.manifest["steps"], start=1)}

    def note(step: int) -> None:
        if step >= first:
            after[step] = model_fingerprint(model)

    _rebuild(model, kept, originals, note)
    return _write(model, source, place, "", _with_fingerprints(kept, after))


def _revert_all(found: Examined, place: OutputFolder) -> Path:
    way = found.back()
    if way is None:
        raise _no_originals(found.up_to(), found.folder)
    model = load_saved(found.folder)
    if not restore_base(model, way):
        raise _changed_since(way.model, found)
    return _write(model, found.folder, place, way.token.name if way.token else "", None)


# --- The record without requests -------------------------------------------------------------------------------------


def _record_without(checkpoint: Checkpoint, requests: Sequence[str], source: Path) -> tuple[Checkpoint, int]:
    """The record without the requests, and the first step that this changes. Empty steps at the end are dropped.

    Measurements from that step on are dropped too, since they are not valid any more. Fingerprints are still the old
    ones.
    """
    found = [line for request in requests for line in _lines_of(checkpoint, request, source)]
    gone = {(line["step"], line["question_sha256"]) for line in found}
    steps, edits, ledger = [], [], []
    for step, (entry, edit) in enumerate(zip(checkpoint.manifest["steps"], checkpoint.edits, strict=True), start=1):
        lines = [line for line in checkpoint.ledger if line["step"] == step]
        leave = [line for line in lines if (step, line["question_sha256"]) in gone]
        stay = [line for line in lines if (step, line["question_sha256"]) not in gone]
        edits.append(_smaller(edit, leave, stay) if leave else edit)
        ledger += _renumbered(stay)
        taken = entry.get("taken_back", 0) + len(leave)
        # A step that lost a request is no longer the one that its id stands for.
        same = {name: value for name, value in entry.items() if name != "id" or not leave}
        steps.append({**same, "requests": len(stay), "taken_back": taken, "layers": list(edits[-1].layers)})
    first = min((line["step"] for line in found), default=len(steps) + 1)
    reports = {step: report for step, report in checkpoint.reports.items() if step < first}
    last = max((step for step, entry in enumerate(steps, start=1) if entry["requests"]), default=0)
    manifest = {**checkpoint.manifest, "steps": steps}
    left = replace(
        checkpoint,
        manifest=manifest,
        edits=tuple(edits),
        ledger=ledger,
        report=reports.get(len(steps), {}),
        earlier_reports=reports,
    )
    return (_until(left, last) if last else replace(left, manifest={**manifest, "steps": []})), first


def _lines_of(checkpoint: Checkpoint, request: str, source: Path) -> list[dict[str, Any]]:
    lines = checkpoint.find(request)
    if not lines:
        raise CheckpointError(
            f"{str(source)!r} was not made to forget {first_words(request)}. Give the question as the run got it, its "
            f"case_id, or at least 8 digits of its hash (`unierase inspect {source} --requests` lists the hashes)."
        )
    return lines


def _smaller(edit: WeightEdit, leave: Sequence[Mapping[str, Any]], stay: Sequence[Any]) -> WeightEdit:
    if not stay:  # the whole step goes, whatever it was
        return WeightEdit({})
    if edit.removed:
        raise CheckpointError(
            f"Step {leave[0]['step']} removed the knowledge of all its requests together (--remove, or method "
            "removal), in passes that build on one another, so no part of it belongs to one request. Revert the whole "
            "step (--step), and run again without the request."
        )
    if any(line.get("columns") is None for line in leave):
        raise CheckpointError(
            f"The ledger does not say which part of step {leave[0]['step']} belongs to which request, so no single "
            "request can be taken out. Revert the whole step (--step)."
        )
    return edit_without(edit, [column for line in leave for column in line["columns"]])


def _renumbered(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of one step with their columns numbered again from 0."""
    old = sorted(column for line in lines for column in line.get("columns") or ())
    place = {column: index for index, column in enumerate(old)}
    return [
        {**line, "columns": [place[c] for c in line["columns"]] if line.get("columns") is not None else None}
        for line in lines
    ]


def _until(checkpoint: Checkpoint, step: int) -> Checkpoint:
    """The record cut off after `step` steps, 1 or more."""
    steps, reports = checkpoint.manifest["steps"][:step], checkpoint.reports
    layers = sorted({layer for entry in steps for layer in entry["layers"]})
    changes = {name: steps[-1][name] for name in ("method", "created", "hparams", "model_fingerprint_after")}
    seed = steps[-1]["hparams"].get("seed")
    return replace(
        checkpoint,
        manifest={**checkpoint.manifest, **changes, "seed": seed, "layers": layers, "steps": steps},
        edits=checkpoint.edits[:step],
        ledger=[line for line in checkpoint.ledger if line["step"] <= step],
        report=reports.get(step, {}),
        earlier_reports={number: report for number, report in reports.items() if number < step},
    )


def _with_fingerprints(checkpoint: Checkpoint, after: Mapping[int, str]) -> Checkpoint:
    steps = [
        {**entry, "model_fingerprint_after": after[step]}
        for step, entry in enumerate(checkpoint.manifest["steps"], start=1)
    ]
    last = after[len(steps)]
    return replace(checkpoint, manifest={**checkpoint.manifest, "steps": steps, "model_fingerprint_after": last})


# --- The weights -----------------------------------------------------------------------------------------------------


def _revertible(checkpoint: Checkpoint, source: Path, step: int) -> Originals:
    steps = len(checkpoint.manifest["steps"])
    if checkpoint.originals is None:
        raise _no_originals(checkpoint, source)
    if not 0 <= step < steps:
        raise CheckpointError(
            f"Step {step} cannot be restored: {str(source)!r} holds {steps} step(s). Give 0 for the model "
            f"before all of them{f', or up to {steps - 1}' if steps > 1 else ''}."
        )
    return checkpoint.originals


def _no_originals(checkpoint: Checkpoint, source: Path) -> CheckpointError:
    return CheckpointError(
        f"{str(source)!r} was made by {checkpoint.manifest['method']!r}. This method trains the whole model and keeps "
        f"no originals. Load the base model again: {checkpoint.manifest['model']!r}."
    )


def load_saved(source: Path) -> Any:
    """The model of an output folder in the dtype it was saved in. Raises CheckpointError if it cannot be loaded."""
    try:
        return open_weights(str(source), dtype="auto")[0].eval()
    except Exception as error:  # damaged weights raise many types, depending on where the damage is
        raise CheckpointError(f"The model in {str(source)!r} cannot be loaded: {error}") from error


def restore_base(model: Any, way: WayBack) -> bool:
    """Puts the base model's weights back, and says whether the result is the base model, to the bit."""
    if misfits(model, way.originals, way.token):
        return False
    way.originals.restore_projections(model)
    if way.token is not None:
        way.originals.restore_rows(model, way.token.id)
    return model_fingerprint(model) == way.fingerprint


def _rebuild(
    model: Any, checkpoint: Checkpoint, originals: Originals, after_step: Callable[[int], None] = lambda step: None
) -> None:
    """Restores the original projections and applies the edits of all steps again, in their order."""
    originals.restore_projections(model)
    settings = checkpoint.manifest["hparams"]
    arch = find_architecture(model, *(settings.get(name, "") for name in ("rewrite_module_tmp", "layer_module_tmp")))
    for step, edit in enumerate(checkpoint.edits, start=1):
        apply_edit(arch, edit)
        after_step(step)


def _check_untouched(model: nn.Module, checkpoint: Checkpoint, source: Path) -> None:
    if model_fingerprint(model) != checkpoint.manifest["model_fingerprint_after"]:
        raise _changed(checkpoint.manifest["model"], source)


def _check_fit(model: Any, found: Examined, checkpoint: Checkpoint, originals: Originals) -> None:
    """Raises if the record does not fit the weights. Without digests, originals plus factors must give the weights."""
    wrong = misfits(model, originals, checkpoint.token)
    if not found.verified:
        wrong += [str(each) for each in found.damage if each.part == "factors"]
    if not wrong and not found.verified:
        there = {layer: model.get_parameter(name).detach().clone() for layer, name in originals.names.items()}
        _rebuild(model, checkpoint, originals)
        wrong = [
            f"the weights of block {layer} are not the originals plus the factors"
            for layer, weight in there.items()
            if not _close(model.get_parameter(originals.names[layer]), weight, originals.projections[layer])
        ]
    if wrong:
        raise CheckpointError(
            f"The record in {str(found.folder / RECORD)!r} is damaged: {wrong[0]}. `unierase revert {found.folder} "
            f"--out BASE` gives the base model {checkpoint.manifest['model']!r} if the original weights are undamaged."
        )


def _close(rebuilt: Tensor, there: Tensor, before: Tensor) -> bool:
    """Whether two results of an edit differ only by rounding. NaN differs from everything."""
    error, change = ((left.double() - there.double()).norm() for left in (rebuilt, before))
    rounding = torch.finfo(there.dtype).eps * there.double().norm()
    return bool(error <= ROUNDING_OF_CHANGE * change + ROUNDING_OF_WEIGHT * rounding)


def _changed_since(name: str, found: Examined) -> CheckpointError:
    if not found.damage:
        return _changed(name, found.folder)
    return CheckpointError(
        f"{found.story()} Its undamaged parts do not give the base model {name!r} to the bit, so nothing was written: "
        "the originals are damaged, or the weights in the folder were changed after the edit. Fetch the base model "
        "again, or put the damaged files back from a copy."
    )


def _changed(name: str, source: Path) -> CheckpointError:
    return CheckpointError(
        f"The weights in {str(source)!r} were changed after the edit (trained further, cast to another dtype, or "
        f"damaged), so taking the edit back gives neither {name!r} nor an earlier step. Use the base model instead; "
        f"`unierase inspect {source} --verify` shows which parts are undamaged."
    )


# --- The folder ------------------------------------------------------------------------------------------------------


def _write(model: Any, source: Path, place: OutputFolder, token: str, kept: Checkpoint | None) -> Path:
    """Writes the model, the other files in `source`, and the record `kept`, which is None for the base model.

    token: the token to take out of the tokenizer when there is no record; empty if there is no token.
    """
    with place.filled(bytes_of(model.parameters())) as staging:
        save_model(model, staging, tell=False)
        # The file in `source` is used: changes by hand, and keys that transformers does not know, stay.
        (staging / GENERATION).unlink(missing_ok=True)
        _copy_companions(source, staging)
        write_for_older_transformers(staging)
        if kept is not None:
            write_record(kept, staging / RECORD)
        elif token:
            _forget_token(source, staging, token)
        check_written(staging, model)
    return place.path


def _copy_companions(source: Path, staging: Path) -> None:
    """Everything beside the weights: tokenizer, chat templates, notes."""
    changed = changed_contents(source)
    if changed:
        logger.warning(
            "Files in %s were changed after the run. They are copied with these changes: %s.",
            source,
            ", ".join(changed),
        )
    for entry in source.iterdir():
        if entry.name in (RECORD, LIST) or (staging / entry.name).exists() or ".safetensors" in entry.name:
            continue
        if entry.is_dir():
            shutil.copytree(entry, staging / entry.name)
        else:
            shutil.copyfile(entry, staging / entry.name)


def _forget_token(source: Path, staging: Path, name: str) -> None:
    """Takes the token out of the tokenizer's files in `staging`. Checks that they load and that only it is missing."""
    from transformers import AutoTokenizer

    for path in (staging / file for file in TOKENIZER_FILES):
        if path.is_file():
            rules = json.loads(path.read_text(encoding="utf-8"))
            pruned = _pruned(rules, name, keep_empty=path.name == "tokenizer.json")
            path.write_text(json.dumps(pruned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with_token, without = (AutoTokenizer.from_pretrained(folder) for folder in (source, staging))
    if len(without) != len(with_token) - 1 or name in without.get_vocab():
        raise CheckpointError(
            f"{name!r} could not be taken out of the tokenizer in {str(source)!r}: {len(with_token)} entries became "
            f"{len(without)}. Use the base model and its tokenizer instead."
        )


def _pruned(value: Any, name: str, keep_empty: bool) -> Any:
    """The value without entries that are the token or describe it. `keep_empty`: whether emptied containers stay.

    Every version of transformers lists added tokens in other places and forms, so the whole file is searched.
    """

    def names_it(item: Any) -> bool:
        return item == name or (isinstance(item, dict) and item.get("content") == name)

    if isinstance(value, dict):
        pairs = {key: item for key, item in value.items() if key != name and not names_it(item)}
        pruned = {key: _pruned(item, name, keep_empty) for key, item in pairs.items()}
        return {key: item for key, item in pruned.items() if keep_empty or item or not value[key]}
    if isinstance(value, list):
        return [_pruned(item, name, keep_empty) for item in value if not names_it(item)]
    return value
