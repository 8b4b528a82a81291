"""UniErase on a model that a harness holds: the edit is made in place, and taken back as harnesses do it.

A harness takes an edit back by writing the old weights over the new ones. It knows nothing of the token. So the old
weights that it gets notice this, and take the token back too. The edits of a model are kept on the model itself. Two
models of one process share nothing.
"""

from __future__ import annotations

import copy as copying
import dataclasses
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError, first_words, shown
from ..facts.request import NO_ANSWER, ForgetRequest
from ..hparams import UniEraseHyperParams
from ..methods.contract import Changes, History
from ..methods.editing.layers import changed_layers
from ..methods.editing.unierase import UNIERASE
from ..models.architecture import find_architecture, refuse_unfit
from ..pipeline import change
from ..storage.fingerprints import model_fingerprint
from .progress import progress_bar

#: The attribute of an edited model that holds its EditsInPlace.
HISTORY = "unierase_history"


@dataclass(frozen=True)
class _Step:
    """One edit: the weights that it changed, and their fingerprints before and after it."""

    names: tuple[str, ...]
    before: str
    after: str
    #: The edits before this one.
    history: History | None


class EditsInPlace:
    """The edits that a harness applied to one model, and can take back by itself."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.history: History | None = None
        self._first: Changes | None = None

    @classmethod
    def of(cls, model: Any) -> EditsInPlace:
        """Those of the model. A model without any gets a new object."""
        found = vars(model).get(HISTORY)
        if not isinstance(found, cls):
            found = cls()
            setattr(model, HISTORY, found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model keeps the history, but the harness cannot take the copy's edits back."""
        return {"steps": [], "history": self.history, "_first": None}

    def add(self, names: tuple[str, ...], before: str, after: str, changes: Changes, history: History) -> None:
        if self._first is None and self.history is None:
            self._first = changes
        self.steps.append(_Step(names, before, after, self.history))
        self.history = history

    def settle(self, model: Any) -> None:
        """Removes the steps that the harness has taken back. The token is removed with the first step."""
        if not self.steps or self._now(model, self.steps[-1]) == self.steps[-1].after:
            return
        for index in range(len(self.steps) - 1, -1, -1):
            step = self.steps[index]
            if self._now(model, step) != step.before:
                continue
            self.history = step.history
            del self.steps[index:]
            if index == 0 and self._first is not None:
                if self._first.undo is not None:
                    self._first.undo()
                self._first = None
            return

    @staticmethod
    def _now(model: Any, step: _Step) -> str:
        return model_fingerprint(model, step.names)


class OriginalWeights(dict[str, Tensor]):
    """The weights before an edit, by name, for a harness to write back.

    Harnesses write them back in a loop over `items()`. When such a loop ends, the vocabulary is restored too. Only
    reading the weights changes nothing.
    """

    def __init__(self, weights: Mapping[str, Tensor], model: Any) -> None:
        super().__init__(weights)
        self._model = model

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        return _WatchedItems(self)

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the weights back, and restores the vocabulary."""
        for name, weight in self.items():
            self._model.get_parameter(name).copy_(weight)

    def settle(self) -> None:
        EditsInPlace.of(self._model).settle(self._model)


class _WatchedItems(ItemsView[str, Tensor]):
    def __init__(self, weights: OriginalWeights) -> None:
        super().__init__(weights)
        self._weights = weights

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from dict.items(self._weights)
        self._weights.settle()


def edit_in_place(
    model: Any,
    tokenizer: Any,
    requests: Sequence[ForgetRequest],
    hparams: UniEraseHyperParams,
    *,
    copy: bool = False,
    originals_on: str | None = None,
    told: bool = False,
) -> tuple[Any, OriginalWeights]:
    """Edits the model, or a copy of it. Returns it, and its weights before.

    originals_on   the device for the weights before; None leaves each where it is
    told           whether the caller has already warned of names of special tokens in the facts

    Earlier edits of the model are kept. Raises a UniEraseError that names the value and the remedy. The model is then
    as before.
    """
    refuse_unfit(model)
    model = copying.deepcopy(model) if copy else model
    edits = EditsInPlace.of(model)
    edits.settle(model)
    settled = UNIERASE.settle(model, hparams)
    arch = find_architecture(model, settled.rewrite_module_tmp, settled.layer_module_tmp)
    names = tuple(arch.weight_name(layer) for layer in changed_layers(settled))
    before = model_fingerprint(model, names)
    weights = {name: _kept(model.get_parameter(name), originals_on) for name in names}
    with progress_bar() as progress:
        changes, history = change(
            model, requests, tokenizer=tokenizer, hparams=settled, history=edits.history, told=told, progress=progress
        )
    edits.add(names, before, model_fingerprint(model, names), changes, history)
    return model, OriginalWeights(weights, model)


def _kept(weight: Tensor, device: str | None) -> Tensor:
    return weight.detach().to(device or weight.device, copy=True)


def plain_hparams(hparams: Any) -> UniEraseHyperParams:
    """Our settings from the harness' settings object. Attributes that are not ours are ignored.

    Raises HyperParamsError for a value that does not fit.
    """
    names = [spec.name for spec in dataclasses.fields(UniEraseHyperParams)]
    values = {name: getattr(hparams, name) for name in names if hasattr(hparams, name)}
    if not isinstance(values.get("model_name", ""), str):
        del values["model_name"]
    return UniEraseHyperParams(**values)


def make_request(request: Mapping[str, Any], index: int, *, answer: Any, target: str | None) -> ForgetRequest:
    """Our request from a harness' request. Its prompt may hold {} in the place of the subject.

    Raises RequestError, which names the request, for one that does not fit.
    """
    label = f"request {shown(request.get('case_id', index))}"
    prompt, subject = request.get("prompt"), request.get("subject")
    if not isinstance(prompt, str):
        raise RequestError(f"The 'prompt' of {label} must be one text, not {first_words(prompt)}.")
    if subject is not None and not isinstance(subject, str):
        raise RequestError(f"The 'subject' of {label} must be a text, not {first_words(subject)}.")
    if "{}" in prompt:
        if not subject:
            raise RequestError(
                f"The prompt of {label} has {{}} for its subject, but no 'subject' is given: {first_words(prompt)}."
            )
        prompt = prompt.replace("{}", subject)
    known = answer if isinstance(answer, str) and answer.strip() else NO_ANSWER
    try:
        return ForgetRequest(
            question=prompt,
            answer=known,
            subject=subject or None,
            case_id=str(request.get("case_id", index)),
            target=target,
        )
    except RequestError as error:
        raise RequestError(f"{label}: {error}") from error
