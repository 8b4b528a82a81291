"""Damage to a record, as data. If a record has no digests, contradictions between its parts show the damage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..locate_then_edit.edit import WeightEdit
from ..unlearning_token import UnlearningToken
from .originals import Originals
from .record import BASE, EDITS, LEDGER, MANIFEST, Checkpoint

#: The keys that a manifest and each of its steps must hold.
KEYS = ("method", "layers", "model_fingerprint_after", "hparams", "salt", "steps", *BASE)
STEP_KEYS = ("method", "created", "layers", "requests", "model_fingerprint_after", "hparams")


@dataclass(frozen=True)
class Damage:
    """One part of a record that is not what was written."""

    file: str
    #: The tensor, line or key; empty for the whole file.
    place: str
    #: What is wrong, as words that follow "is damaged: <file>, <place>".
    what: str
    #: What it concerns: everything, originals, token, factors, ledger or report.
    part: str = "everything"
    #: The first step that it concerns. It concerns all later steps too. 0 stands for all steps.
    step: int = 0

    def __str__(self) -> str:
        return f"{self.file}{f', {self.place}' if self.place else ''} {self.what}"

    def concerns(self, last: int) -> bool:
        """Whether the model after `last` steps, or its record, depends on the damaged part."""
        return self.part != "report" and self.step <= last


def contradictions(checkpoint: Checkpoint) -> list[Damage]:
    """Counts and shapes that do not fit together in manifest, ledger and tensors."""
    try:
        return list(_contradictions(checkpoint))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [Damage(MANIFEST, "", f"does not hold what such a file holds ({type(error).__name__}: {error})")]


def misfits(model: Any, originals: Originals, token: UnlearningToken | None = None) -> list[str]:
    """Parts of a record that do not fit the model, in words."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for layer, weight in originals.projections.items():
        there = parameters.get(str(originals.names[layer]))
        if there is None or there.shape != weight.shape:
            shape = "not there" if there is None else f"of shape {_shape(there)}"
            found.append(f"{originals.names[layer]} is {shape} in the model, of shape {_shape(weight)} in the record")
    rows, width = model.get_input_embeddings().weight.shape
    if token is not None and not 0 <= token.id < rows:
        found.append(f"the token has the id {token.id}, but the model has only {rows} rows")
    if not isinstance(originals.vocabulary, int) or not 0 < originals.vocabulary <= rows:
        found.append(f"the vocabulary had {originals.vocabulary} rows, and the model has {rows}")
    for name in ("input_row", "output_row"):
        row = getattr(originals, name)
        if row is not None and row.shape != (width,):
            found.append(f"the original {name} is of shape {_shape(row)}, but a row of the model has {width} values")
    return found


def _contradictions(checkpoint: Checkpoint) -> Iterator[Damage]:
    manifest, steps = checkpoint.manifest, checkpoint.manifest["steps"]
    lacking = [name for name in KEYS if name not in manifest]
    lacking += [f"steps[{at}].{name}" for at, entry in enumerate(steps) for name in STEP_KEYS if name not in entry]
    if lacking or not steps:
        yield Damage(MANIFEST, "", f"lacks {', '.join(lacking) or 'steps'}")
        return
    if len(checkpoint.edits) not in (0, len(steps)):
        what = f"holds factors of {len(checkpoint.edits)} steps, but the manifest names {len(steps)}"
        yield Damage(EDITS, "", what, "factors")
        return
    yield from _ledger(checkpoint)
    yield from _token(checkpoint)
    if checkpoint.originals is not None:
        yield from _names(checkpoint.originals, manifest)
    for step, edit in enumerate(checkpoint.edits, start=1):
        yield from _factors(edit, step, steps[step - 1], checkpoint.originals)
        yield from _columns([line for line in checkpoint.ledger if line["step"] == step], step, edit)


def _ledger(checkpoint: Checkpoint) -> Iterator[Damage]:
    steps = checkpoint.manifest["steps"]
    for number, line in enumerate(checkpoint.ledger, start=1):
        if not isinstance(line["question_sha256"], str) or line["step"] not in range(1, len(steps) + 1):
            yield Damage(LEDGER, f"line {number}", f"is of step {line['step']}, of {len(steps)}", "ledger")
    for step, entry in enumerate(steps, start=1):
        count = sum(line["step"] == step for line in checkpoint.ledger)
        if count != entry["requests"]:
            what = f"holds {count} lines of step {step}, but the manifest names {entry['requests']} requests"
            yield Damage(file=LEDGER, place="", what=what, part="ledger", step=step)


def _columns(lines: Sequence[Mapping[str, Any]], step: int, edit: WeightEdit) -> Iterator[Damage]:
    """A run writes columns in order: each request's columns follow those of the request before."""
    given = [line.get("columns") for line in lines]
    if not edit.layers or all(columns is None for columns in given):
        return
    columns = [column for part in given for column in part or ()]
    if None in given or columns != list(range(edit.rank(edit.layers[0]))):
        what = f"does not assign each column of step {step} to one request, in order"
        yield Damage(file=LEDGER, place="", what=what, part="ledger", step=step)


def _token(checkpoint: Checkpoint) -> Iterator[Damage]:
    told, token = checkpoint.manifest["token"], checkpoint.token
    if (None if told is None else (told["name"], told["id"])) != (None if token is None else (token.name, token.id)):
        yield Damage(MANIFEST, "token", f"differs from that of {EDITS}", "token")
    if token is not None:
        for name in ("input_row", "output_row"):
            row = getattr(token, name)
            if row is not None and (row.ndim != 1 or not torch.isfinite(row).all()):
                yield Damage(EDITS, f"token.{name}", "is not a row of finite numbers", "token")


def _names(originals: Originals, manifest: Mapping[str, Any]) -> Iterator[Damage]:
    if {str(layer): name for layer, name in originals.names.items()} != manifest["weights"]:
        yield Damage(MANIFEST, "weights", f"have other names than in {EDITS}")


def _factors(edit: WeightEdit, step: int, entry: Mapping[str, Any], originals: Originals | None) -> Iterator[Damage]:
    if sorted(edit.layers) != sorted(entry["layers"]):
        what = f"holds blocks {sorted(edit.layers)} of step {step}, but the manifest names {entry['layers']}"
        yield Damage(file=EDITS, place="", what=what, part="factors", step=step)
    for layer, update in edit.updates.items():
        width, keys = (update.up.shape[0], update.down.shape[-1]), edit.keys.get(layer)
        whole = originals.projections.get(layer) if originals is not None else None
        if update.up.ndim != 2 or update.down.ndim != 2 or update.up.shape[1] != update.down.shape[0]:
            what = f"is of shape {_shape(update.up)} and {_shape(update.down)}, which do not fit together"
        elif originals is not None and (whole is None or not _fits(whole, width)):
            what = f"changes a weight of shape {width}; the original is {'gone' if whole is None else _shape(whole)}"
        elif keys is not None and (keys.ndim != 2 or keys.shape[0] != width[1]):
            what = f"has keys of shape {_shape(keys)}, but {width[1]} inputs"
        elif not all(bool(torch.isfinite(each).all()) for each in (update.up, update.down, keys) if each is not None):
            what = "holds NaN or infinity"
        else:
            continue
        yield Damage(file=EDITS, place=f"block {layer} of step {step},", what=what, part="factors", step=step)


def _fits(whole: Tensor, width: tuple[int, int]) -> bool:
    """Whether an update (d, m) changes this weight: (d, m) or (m, d), or m = E I of E stacked experts."""
    if whole.ndim == 3:
        return whole.numel() == width[0] * width[1] and width[0] in whole.shape[1:]
    return sorted(whole.shape) == sorted(width)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
