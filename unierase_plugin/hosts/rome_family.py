"""ROME, MEMIT, AlphaEdit and harnesses like them: `apply_unierase_to_model`, with the signature of their own methods.

A harness needs two lines for it: an import, and an entry in its table of algorithms. docs/how-to/hosts.md shows both.
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
    """Makes the model forget what the requests ask. It has the signature of ROME's and MEMIT's own functions.

    requests         mappings with `prompt` (with {} for the subject), `subject`, `case_id`, and optionally
                     `target_true` ({"str": ...}): the answer to forget. `target_new` is ignored: it is what an editing
                     method would write, and UniErase writes its token and an "I don't know" sentence
    cache_template   ignored: UniErase has a cache of its own
    return_orig_weights_device   the device for the returned weights; None leaves them where the model's are

    Returns the model and its weights before the edit, by name. The model is edited in place unless `copy` is set. The
    weights are empty unless `return_orig_weights` is set. A model that was edited before, and whose weights were not
    written back, is edited further. Raises a UniEraseError that names the value and the remedy; the model is then as
    before.
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
