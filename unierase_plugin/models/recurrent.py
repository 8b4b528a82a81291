"""Checks that a model keeps only keys and values of earlier tokens: the passes of an edit continue from these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ArchitectureError, reason

#: The test input: two rows of three tokens.
ROWS = ((1, 2, 3), (3, 1, 2))


@torch.no_grad()
def refuse_recurrent(model: Any) -> None:
    """Raises ArchitectureError for a model that keeps anything but keys and values of earlier tokens."""
    kind = type(model).__name__
    with evaluating(model):
        ids = torch.tensor(ROWS, device=model.get_input_embeddings().weight.device)
        try:
            out = model(ids, use_cache=True)
        except Exception as error:  # whatever a model's own code raises
            raise ArchitectureError(
                f"{kind} cannot keep the keys and values of earlier tokens, from which the passes of an edit continue: "
                f"{type(error).__name__}: {reason(error)}. UniErase edits decoder-only models of attention blocks."
            ) from error
    cache = getattr(out, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    states = [name for name in ("cache_params", "state") if getattr(out, name, None) is not None]
    if states:
        what = f"a state ({states[0]})"
    elif cache is None:
        what = "nothing"
    elif not layers:
        what = f"a {type(cache).__name__}"
    else:
        others = [type(layer).__name__ for layer in layers if not isinstance(getattr(layer, "keys", None), Tensor)]
        if not others:
            return
        what = f"in {len(others)} of {len(layers)} blocks a state ({others[0]})"
    raise ArchitectureError(
        f"{kind} does not consist of attention blocks alone (it is recurrent, or a mixture): of earlier tokens it "
        f"keeps {what}, not the keys and values from which the passes of an edit continue. UniErase edits decoder-only "
        "models of attention blocks."
    )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Puts the model in evaluation mode for a while; its former mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
