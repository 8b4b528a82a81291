"""ROME, MEMIT, AlphaEdit and their relatives: their `apply_X_to_model` for UniErase.

Such a harness takes it by an import and an entry in its table of algorithms. docs/how-to/hosts.md shows both lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..hparams import UniEraseHyperParams
from .in_place import edit_in_place, make_request, plain_hparams


def apply_unierase_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: UniEraseHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | None = None,
    return_orig_weights_device: str | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Makes the model forget what the requests ask, by the contract of ROME and MEMIT.

    requests         `prompt` with {} for the `subject`, `case_id`, and optionally `target_true` ({"str": ...}), the
                     fact to be forgotten. `target_new` is what an editing method would write in its place, which
                     the data sets of these harnesses always have; UniErase writes its token and an "I don't know"
                     sentence, so it is not read
    cache_template   where MEMIT keeps values; UniErase has a cache of its own, so it is not read
    return_orig_weights_device   where the returned weights are to lie; None leaves them beside the model's

    Returns the model, edited in place unless `copy` is set, and the weights before by name, empty unless
    `return_orig_weights` is set. A model that was edited before, and whose weights were not written back, is edited
    further. Raises a UniEraseError that names value and remedy; the model is then as before.
    """
    facts = [
        make_request(request, index, answer=_true_answer(request), target=None)
        for index, request in enumerate(requests)
    ]
    edited, originals = edit_in_place(
        model, tok, facts, plain_hparams(hparams), copy=copy, originals_on=return_orig_weights_device
    )
    return edited, originals if return_orig_weights else {}


def _true_answer(request: Mapping[str, Any]) -> Any:
    value = request.get("target_true")
    return value.get("str") if isinstance(value, Mapping) else value
