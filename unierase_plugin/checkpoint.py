"""The output folder: a plain Hugging Face model folder, and in `unierase/` a record from which the edit is taken back.

    manifest.json        what was done to which model by which versions; fingerprints before and after
    edits.safetensors    the update's factors and keys by step and layer, the weights as they were, the token's rows
    ledger.jsonl         one line a request, as salted hashes unless the requests are to be kept in the clear
    report.json          what was measured

Steps are counted from 1: step k is what the k-th run of sequential unlearning added; step 0 is the unedited model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Architecture, find_architecture
from .errors import CheckpointError
from .locate_then_edit.edit import WeightEdit, apply_edit
from .locate_then_edit.solve import LowRank
from .request import ForgetRequest
from .store import (
    Packed,
    Store,
    clear_leftovers,
    model_fingerprint,
    pack_token,
    plain,
    read_tensors,
    replace_folder,
    unpack_token,
    write_tensors,
)
from .unlearning_token import UnlearningToken

logger = logging.getLogger(__name__)

#: Version of the layout of `unierase/`; a reader refuses what is newer than itself.
SCHEMA = 1
#: Name of the folder that holds the record.
RECORD = "unierase"
#: What the caller must say in `manifest_extra`, since the model in memory does not tell.
REQUIRED_EXTRA = ("method", "model", "model_fingerprint_before", "created")
#: Files of a tokenizer in which an added token is named.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Originals:
    """What an edit overwrites, as it was: projections by layer (d, m), and the padding row where the token took one."""

    projections: Mapping[int, Tensor]
    #: Name of each projection's weight within the model.
    names: Mapping[int, str]
    #: Rows of the embedding before the token was added.
    vocabulary: int
    #: (d,) each, and a scalar; None where the row is new, or where the model has no such part.
    input_row: Tensor | None = None
    output_row: Tensor | None = None
    output_bias: Tensor | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What `unierase/` holds."""

    manifest: Mapping[str, Any]
    token: UnlearningToken | None
    #: One edit a step, oldest first; empty for methods that train the whole model.
    edits: tuple[WeightEdit, ...]
    originals: Originals | None
    #: One dictionary a request, oldest first, with `step` among its keys.
    ledger: list[dict[str, Any]]
    report: Mapping[str, Any]

    @property
    def edit(self) -> WeightEdit:
        """All steps joined into one update a layer, with the keys of all: what an adapter or a later step needs."""
        return join_edits(self.edits)

    def holds(self, question: str) -> bool:
        """Whether the ledger has a line for exactly this question."""
        hashed = ledger_hash(self.manifest["salt"], question)
        return any(line["question_sha256"] == hashed for line in self.ledger)


def take_originals(
    arch: Architecture, layers: Sequence[int], vocabulary: int, token_id: int | None = None
) -> Originals:
    """Copies what the edit of `layers` and the token's rows will overwrite.

    To be called after `add_token` and before `install_token`; `vocabulary` is the number of rows before `add_token`.
    Without a token, `token_id` is None.
    """
    projections = {layer: _copy(arch.projections[layer].weight) for layer in layers}
    names = {layer: arch.weight_name(layer) for layer in layers}
    if token_id is None or token_id >= vocabulary:
        return Originals(projections, names, vocabulary)
    embedding: Any = arch.embedding
    head: Any = arch.head
    row = _copy(embedding.weight[token_id])
    if arch.tied:
        return Originals(projections, names, vocabulary, row)
    bias, output_row = getattr(head, "bias", None), _copy(head.weight[token_id])
    return Originals(projections, names, vocabulary, row, output_row, None if bias is None else _copy(bias[token_id]))


def join_edits(edits: Sequence[WeightEdit]) -> WeightEdit:
    """The sum of several edits as one: factors and keys side by side. Norms of a sum are not known and left out."""
    if len(edits) == 1:
        return edits[0]
    layers = sorted({layer for edit in edits for layer in edit.layers})
    parts = {layer: [edit.updates[layer] for edit in edits if layer in edit.updates] for layer in layers}
    keys = {layer: [edit.keys[layer] for edit in edits if layer in edit.keys] for layer in layers}
    return WeightEdit(
        {
            layer: LowRank(torch.cat([u.up for u in updates], dim=1), torch.cat([u.down for u in updates]))
            for layer, updates in parts.items()
        },
        keys={layer: torch.cat(found, dim=1) for layer, found in keys.items() if found},
    )


# --- Before and during a run -----------------------------------------------------------------------------------------


def check_output_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """The folder as an absolute path, where a checkpoint may be written to it. To be called before the work starts.

    Raises CheckpointError where it is a file, holds something and `overwrite` is not set, cannot be written, or is a
    folder that nobody means to lose: one that the home or the working folder lies in.
    """
    target = Path(folder).expanduser().resolve()
    clear_leftovers(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError(
            f"{str(target)!r} is a file. Give the name of a folder, which is made where there is none."
        )
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"The output folder {str(target)!r} is not empty. Choose another, or pass --overwrite (overwrite=True) "
                "to replace it."
            )
        _refuse_precious(target)
    ground = next(parent for parent in target.parents if parent.exists())
    if not os.access(ground, os.W_OK | os.X_OK):
        raise CheckpointError(f"{str(ground)!r} cannot be written to. Choose an output folder elsewhere.")
    return target


def _refuse_precious(target: Path) -> None:
    for place in (Path(os.path.expanduser("~")), Path.cwd()):
        if place.resolve().is_relative_to(target):
            raise CheckpointError(
                f"{str(target)!r} is not replaced, since {str(place)!r} lies in it. Choose another output folder."
            )


def work_folder(out: str | Path, run_key: str) -> Store:
    """Where the finished phases of an unfinished run are kept: `.<name>.work` beside the output folder."""
    return Store(_work_root(out) / run_key)


def discard_work(out: str | Path) -> None:
    """Removes the finished phases of all unfinished runs into `out`."""
    shutil.rmtree(_work_root(out), ignore_errors=True)


def _work_root(out: str | Path) -> Path:
    target = Path(out).expanduser().resolve()
    return target.with_name(f".{target.name}.work")


# --- Writing ---------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    *,
    model: Any,
    tokenizer: Any,
    token: UnlearningToken | None,
    edit: WeightEdit | None,
    originals: Originals | None,
    requests: Sequence[ForgetRequest],
    hparams: Any,
    manifest_extra: Mapping[str, Any],
    report: Mapping[str, Any],
    overwrite: bool = False,
    keep_requests: bool = False,
    earlier: Checkpoint | None = None,
) -> Path:
    """Writes the edited model with its record; the folder appears whole or not at all, and an old one stays until then.

    manifest_extra must hold REQUIRED_EXTRA and may hold more. `earlier` is the checkpoint that this run went on from:
    its steps, ledger and originals are carried over. `originals` may be None for a method that cannot be reverted.
    Raises CheckpointError where the folder is not free (`check_output_folder`) or cannot be written.
    """
    target = check_output_folder(folder, overwrite)
    missing = [name for name in REQUIRED_EXTRA if name not in manifest_extra]
    if missing:
        raise CheckpointError(f"manifest_extra lacks {', '.join(missing)}; it needs {', '.join(REQUIRED_EXTRA)}.")
    kept = _merge_originals(originals, earlier)
    edits = (*(earlier.edits if earlier else ()), *([edit] if edit else ()))
    manifest = _manifest(model, tokenizer, token, kept, requests, hparams, manifest_extra, edit, earlier)
    lines = list(earlier.ledger) if earlier else []
    forms = list(getattr(hparams, "prompt_forms", ()))
    lines += _ledger(requests, len(manifest["steps"]), manifest["salt"], forms, keep_requests)
    checkpoint = Checkpoint(manifest, token, edits, kept, lines, report)
    with replace_folder(target, _bytes_of(model.parameters()) + _bytes_of(_pack(checkpoint)[0].values())) as staging:
        _save_model(model, staging)
        tokenizer.save_pretrained(staging)
        _write_record(checkpoint, staging / RECORD)
    return target


def save_plain(
    folder: str | Path, model: Any, tokenizer: Any, notes: Mapping[str, str], overwrite: bool = False
) -> Path:
    """Writes a model folder without a record, and `notes` as text files by name; whole or not at all."""
    target = check_output_folder(folder, overwrite)
    with replace_folder(target, _bytes_of(model.parameters())) as staging:
        _save_model(model, staging)
        tokenizer.save_pretrained(staging)
        for name, text in notes.items():
            (staging / name).write_text(text, encoding="utf-8")
    return target


def _merge_originals(new: Originals | None, earlier: Checkpoint | None) -> Originals | None:
    """Originals of the very first state: what an earlier step kept wins, since the new one saw weights already edited.

    None as soon as one step kept none: there is no way back behind it.
    """
    if earlier is None:
        return new
    old = earlier.originals
    if new is None or old is None:
        return None
    return replace(old, projections={**new.projections, **old.projections}, names={**new.names, **old.names})


def _manifest(
    model: Any, tokenizer: Any, token: UnlearningToken | None, originals: Originals | None,
    requests: Sequence[ForgetRequest], hparams: Any, extra: Mapping[str, Any], edit: WeightEdit | None,
    earlier: Checkpoint | None,
) -> dict[str, Any]:  # fmt: skip
    settings = plain(hparams.as_dict() if hasattr(hparams, "as_dict") else hparams)
    layers = list(edit.layers) if edit else []
    after = model_fingerprint(model)
    step = {
        "method": extra["method"], "created": extra["created"], "layers": layers, "requests": len(requests),
        "model_fingerprint_after": after, "hparams": settings,
    }  # fmt: skip
    before = earlier.manifest if earlier else extra
    return {
        **plain(extra),
        "schema": SCHEMA,
        "model": str(before["model"]),
        "model_fingerprint_before": before["model_fingerprint_before"],
        "model_fingerprint_after": after,
        "hparams": settings,
        "seed": settings.get("seed"),
        "versions": _versions(),
        "token": _token_entry(model, token, originals),
        "tokenizer_length_before": len(tokenizer) - (token is not None),
        "tied": _is_tied(model),
        "layers": sorted({*layers, *(earlier.manifest["layers"] if earlier else ())}),
        "weights": {str(layer): name for layer, name in originals.names.items()} if originals else {},
        # Against a search for a hash seen elsewhere; who holds the folder can still test a guess.
        "salt": earlier.manifest["salt"] if earlier else secrets.token_hex(16),
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


def ledger_hash(salt: str, text: str) -> str:
    """Hex sha256 of a text under a checkpoint's salt."""
    return hashlib.sha256(f"{salt}\0{text}".encode()).hexdigest()


def _ledger(
    requests: Iterable[ForgetRequest], step: int, salt: str, forms: list[str], in_the_clear: bool
) -> Iterator[dict[str, Any]]:
    for request in requests:
        texts = {"question": request.question, "answer": request.answer, "subject": request.subject}
        line: dict[str, Any] = {"step": step, "case_id": request.case_id, "forms": forms}
        for name, text in texts.items():
            line[f"{name}_sha256"] = None if text is None else ledger_hash(salt, text)
        yield {**line, **texts} if in_the_clear else line


def _save_model(model: Any, folder: Path) -> None:
    with _valid_generation_config(model):
        model.save_pretrained(folder)


@contextmanager
def _valid_generation_config(model: Any) -> Iterator[None]:
    """transformers refuses to save sampling settings without do_sample, which published models have.

    Under greedy decoding they mean nothing, so they are left out of the copy that is saved.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _is_valid(config):
        yield
        return
    repaired, default = deepcopy(config), type(config)()
    for name in ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        if hasattr(repaired, name):
            setattr(repaired, name, getattr(default, name))
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


def _write_record(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    tensors, metadata = _pack(checkpoint)
    write_tensors(folder / "edits.safetensors", tensors, metadata)
    _write_json(folder / "manifest.json", checkpoint.manifest)
    _write_json(folder / "report.json", checkpoint.report)
    lines = [json.dumps(plain(line), ensure_ascii=False) + "\n" for line in checkpoint.ledger]
    (folder / "ledger.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pack(checkpoint: Checkpoint) -> Packed:
    """The contents of `edits.safetensors`."""
    tensors, metadata = pack_edits(checkpoint.edits)
    originals = checkpoint.originals
    if originals is not None:
        metadata["originals"] = json.dumps({"vocabulary": originals.vocabulary, "names": dict(originals.names)})
        tensors.update({f"original.layer{layer}": weight for layer, weight in originals.projections.items()})
        rows = {name: getattr(originals, name) for name in ("input_row", "output_row", "output_bias")}
        tensors.update({f"original.token.{name}": row for name, row in rows.items() if row is not None})
    if checkpoint.token is not None:
        packed, described = pack_token(checkpoint.token)
        tensors.update({f"token.{name}": tensor for name, tensor in packed.items()})
        metadata["token"] = json.dumps(described)
    return tensors, metadata


def pack_edits(edits: Sequence[WeightEdit]) -> Packed:
    """Factors, keys and norms of edits, oldest first."""
    tensors: dict[str, Tensor] = {}
    norms: list[dict[str, Any]] = []
    for step, edit in enumerate(edits, start=1):
        for layer, update in edit.updates.items():
            tensors[f"step{step}.layer{layer}.up"] = update.up
            tensors[f"step{step}.layer{layer}.down"] = update.down
        tensors.update({f"step{step}.layer{layer}.keys": keys for layer, keys in edit.keys.items()})
        norms.append({"residual_norms": list(edit.residual_norms), "norm_ratios": dict(edit.norm_ratios)})
    return tensors, {"norms": json.dumps(norms)}


def unpack_edits(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[WeightEdit, ...]:
    norms = json.loads(metadata["norms"])
    return tuple(_unpack_step(tensors, step, entry) for step, entry in enumerate(norms, start=1))


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """The record of an output folder; the model itself is not loaded.

    Raises CheckpointError where the folder is no output folder of this package, is of a newer schema, or is damaged.
    """
    target = Path(folder).expanduser().resolve()
    if not target.exists():
        clear_leftovers(target)  # a process killed between its two renames has left the folder under another name
    record = target / RECORD
    if not (record / "manifest.json").is_file():
        what = "has no unierase/manifest.json" if target.is_dir() else "is no folder"
        raise CheckpointError(
            f"{str(target)!r} {what}, so it is no checkpoint of an edit. Give the output folder (--out) of a run."
        )
    manifest = _read_json(record / "manifest.json")
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int):
        raise CheckpointError(f"{str(record / 'manifest.json')!r} has no schema version. Run the edit again.")
    if schema > SCHEMA:
        writer = manifest.get("versions", {}).get("unierase_plugin", "of a later version")
        raise CheckpointError(
            f"{str(target)!r} is of schema {schema}, written by unierase-plugin {writer}; this version reads up to "
            f"schema {SCHEMA}. Upgrade it: pip install -U unierase-plugin."
        )
    try:
        token, edits, originals = _unpack(*read_tensors(record / "edits.safetensors"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{str(record / 'edits.safetensors')!r} lacks {error}. Run the edit again.") from error
    return Checkpoint(manifest, token, edits, originals, _read_ledger(record), _read_json(record / "report.json"))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}). Run the edit again.") from error


def _read_ledger(record: Path) -> list[dict[str, Any]]:
    path = record / "ledger.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}). Run the edit again.") from error


def _unpack(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[UnlearningToken | None, tuple[WeightEdit, ...], Originals | None]:
    token = None
    if "token" in metadata:
        rows = {name.removeprefix("token."): tensor for name, tensor in tensors.items() if name.startswith("token.")}
        token = unpack_token(rows, json.loads(metadata["token"]))
    return token, unpack_edits(tensors, metadata), _unpack_originals(tensors, metadata)


def _unpack_step(tensors: Mapping[str, Tensor], step: int, norms: Mapping[str, Any]) -> WeightEdit:
    def by_layer(part: str) -> dict[int, Tensor]:
        pattern = re.compile(rf"step{step}\.layer(\d+)\.{part}")
        matches = {name: pattern.fullmatch(name) for name in tensors}
        return dict(sorted((int(match[1]), tensors[name]) for name, match in matches.items() if match))

    downs = by_layer("down")
    updates = {layer: LowRank(up, downs[layer]) for layer, up in by_layer("up").items()}
    ratios = {int(layer): ratio for layer, ratio in norms["norm_ratios"].items()}
    return WeightEdit(updates, tuple(norms["residual_norms"]), ratios, by_layer("keys"))


def _unpack_originals(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Originals | None:
    if "originals" not in metadata:
        return None
    described = json.loads(metadata["originals"])
    names = {int(layer): name for layer, name in described["names"].items()}
    rows = {name: tensors.get(f"original.token.{name}") for name in ("input_row", "output_row", "output_bias")}
    projections = {layer: tensors[f"original.layer{layer}"] for layer in names}
    return Originals(projections, names, described["vocabulary"], **rows)


# --- Taking it back --------------------------------------------------------------------------------------------------


def revert_checkpoint(folder: str | Path, out: str | Path, overwrite: bool = False, step: int = 0) -> Path:
    """Writes the model as it was after `step` steps to `out`.

    Step 0 gives the base model to the bit, without the token and without a record: where the token had been added by
    enlarging the vocabulary, it gets its old size back, and where it had taken a padding row, that row its old content.
    Later steps give a checkpoint that ends there. Raises CheckpointError where the method kept no originals, or where
    the weights in `folder` are not those that the record was written for.
    """
    source = Path(folder).expanduser().resolve()
    checkpoint = read_checkpoint(source)
    originals = _revertible(checkpoint, source, step)
    target = check_output_folder(out, overwrite)
    model = _load_model(source)
    _restore(model, checkpoint, originals, step)
    _check_weights(model, checkpoint, source, step)
    with replace_folder(target, _bytes_of(model.parameters())) as staging:
        _save_model(model, staging)
        _copy_companions(source, staging)
        if step:
            _write_record(_until(checkpoint, step), staging / RECORD)
        elif checkpoint.token is not None:
            _forget_token(source, staging, checkpoint.token.name)
    return target


def _revertible(checkpoint: Checkpoint, source: Path, step: int) -> Originals:
    steps = len(checkpoint.manifest["steps"])
    if checkpoint.originals is None:
        raise CheckpointError(
            f"{str(source)!r} was made by {checkpoint.manifest['method']!r}, which trains the whole model and keeps no "
            f"originals. Load the base model again: {checkpoint.manifest['model']!r}."
        )
    if not 0 <= step < steps:
        raise CheckpointError(
            f"There is no going back to step {step}: {str(source)!r} holds {steps} step(s). Give 0 for the model "
            f"before all of them{f', or up to {steps - 1}' if steps > 1 else ''}."
        )
    return checkpoint.originals


def _load_model(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    except Exception as error:  # damaged weights surface as many types, depending on where the damage is
        raise CheckpointError(f"The model in {str(source)!r} cannot be loaded: {error}") from error


@torch.no_grad()
def _restore(model: Any, checkpoint: Checkpoint, originals: Originals, step: int) -> None:
    for layer, weight in originals.projections.items():
        model.get_parameter(originals.names[layer]).copy_(weight)
    if step:
        settings = checkpoint.manifest["hparams"]
        templates = [settings.get(name, "") for name in ("rewrite_module_tmp", "layer_module_tmp")]
        arch = find_architecture(model, *templates)
        for edit in checkpoint.edits[:step]:
            apply_edit(arch, edit)
    elif checkpoint.token is not None:
        _remove_rows(model, originals, checkpoint.token.id)


def _remove_rows(model: Any, originals: Originals, token_id: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight.shape[0] > originals.vocabulary:
        model.resize_token_embeddings(originals.vocabulary, mean_resizing=False)
        return
    if originals.input_row is not None:
        embedding.weight[token_id] = originals.input_row
    if originals.output_row is not None:
        head.weight[token_id] = originals.output_row
    if originals.output_bias is not None:
        head.bias[token_id] = originals.output_bias


def _check_weights(model: nn.Module, checkpoint: Checkpoint, source: Path, step: int) -> None:
    manifest = checkpoint.manifest
    if step == 0 and model_fingerprint(model) != manifest["model_fingerprint_before"]:
        raise CheckpointError(
            f"The weights in {str(source)!r} were changed after the edit (trained further, or cast to another dtype), "
            f"so taking the edit back does not give {manifest['model']!r} again. Use the base model instead."
        )
    if step and model_fingerprint(model) != manifest["steps"][step - 1]["model_fingerprint_after"]:
        # Factors are multiplied again here, and another processor may round a product differently.
        logger.warning("The weights after step %d are rebuilt up to rounding, not to the bit.", step)


def _copy_companions(source: Path, staging: Path) -> None:
    """Everything beside the weights: tokenizer, chat templates, notes."""
    for entry in source.iterdir():
        if entry.name == RECORD or (staging / entry.name).exists() or ".safetensors" in entry.name:
            continue
        if entry.is_dir():
            shutil.copytree(entry, staging / entry.name)
        else:
            shutil.copyfile(entry, staging / entry.name)


def _until(checkpoint: Checkpoint, step: int) -> Checkpoint:
    steps = checkpoint.manifest["steps"][:step]
    layers = sorted({layer for entry in steps for layer in entry["layers"]})
    changes = {name: steps[-1][name] for name in ("method", "created", "hparams", "model_fingerprint_after")}
    manifest = {**checkpoint.manifest, **changes, "layers": layers, "steps": steps}
    ledger = [line for line in checkpoint.ledger if line["step"] <= step]
    return replace(checkpoint, manifest=manifest, edits=checkpoint.edits[:step], ledger=ledger, report={})


def _forget_token(source: Path, staging: Path, name: str) -> None:
    """Takes the token out of the tokenizer's files in `staging`, and makes sure that they load and lack only that."""
    from transformers import AutoTokenizer

    for path in (staging / file for file in TOKENIZER_FILES):
        if path.is_file():
            rules = json.loads(path.read_text(encoding="utf-8"))
            pruned = _without(rules, name, keep_empty=path.name == "tokenizer.json")
            path.write_text(json.dumps(pruned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with_token, without = (AutoTokenizer.from_pretrained(folder) for folder in (source, staging))
    if len(without) != len(with_token) - 1 or name in without.get_vocab():
        raise CheckpointError(
            f"{name!r} could not be taken out of the tokenizer in {str(source)!r}: {len(with_token)} entries became "
            f"{len(without)}. Use the base model and its tokenizer instead."
        )


def _without(value: Any, name: str, keep_empty: bool) -> Any:
    """The value without any entry that is the token or describes it; containers that this empties go too, or are kept.

    Every version of transformers lists added tokens in other places and forms, so that all of a file is searched.
    """

    def names_it(item: Any) -> bool:
        return item == name or (isinstance(item, dict) and item.get("content") == name)

    if isinstance(value, dict):
        pairs = {key: item for key, item in value.items() if key != name and not names_it(item)}
        pruned = {key: _without(item, name, keep_empty) for key, item in pairs.items()}
        return {key: item for key, item in pruned.items() if keep_empty or item or not value[key]}
    if isinstance(value, list):
        return [_without(item, name, keep_empty) for item in value if not names_it(item)]
    return value


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _copy(tensor: Any) -> Tensor:
    return torch.Tensor.detach(tensor).cpu().clone()


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
