"""Checks a model folder that was just written, before it becomes the output: names, types and shapes of all weights.

Only headers are read, so it is quick for a model of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, reason
from ..models.adapters import CONFIG as ADAPTER
from ..models.tying import is_tied, says_tied
from ..models.weight_files import Stored, stored_weights


def check_written(folder: Path, model: Any) -> None:
    """Raises CheckpointError if the folder does not open as the model: its files must hold what its config says.

    Call it before the folder becomes the output.
    """
    if (folder / ADAPTER).exists():
        raise _unlike(f"it holds an adapter ({ADAPTER}), which transformers would attach to another model")
    try:
        stored = stored_weights(folder)
        config = type(model.config).from_pretrained(folder)
        fresh = _fresh(type(model), config)
    except Exception as error:  # of safetensors, of the config's class or of the model's
        raise _unlike(f"it cannot be opened: {type(error).__name__}: {reason(error)}") from error
    if says_tied(config) != is_tied(model):
        raise _unlike(f"its config says that the head is {'' if says_tied(config) else 'not '}the embedding")
    wrong = _other_content(stored, fresh, model.state_dict())
    if wrong:
        raise _unlike(wrong)
    wrong = _other_names(stored, fresh)
    # transformers stores some weights under other names, or several as one. Only its own rules can tell.
    if wrong and not (find_spec("accelerate") and _opens(folder, type(model))):
        raise _unlike(wrong)


def _fresh(kind: Any, config: Any) -> dict[str, Tensor]:
    """The weights, without content, of a model with this config."""
    with torch.device("meta"):
        state: dict[str, Tensor] = kind(config).state_dict(keep_vars=True)
    return state


def _other_content(stored: Mapping[str, Stored], fresh: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> str:
    """A weight with another shape than in a model of the config, or another type than in memory; empty for none."""
    for name in (name for name in stored if name in fresh and name in held):
        found, shape, dtype = stored[name], tuple(fresh[name].shape), held[name].dtype
        if found.shape != shape:
            return f"{name} is {list(found.shape)}, not {list(shape)}"
        if found.dtype != dtype:
            return f"{name} is {found.dtype}, not {dtype}"
    return ""


def _other_names(stored: Mapping[str, Stored], fresh: Mapping[str, Tensor]) -> str:
    """A weight that is missing under all of its names, or one that the config does not have; empty for none."""
    held = {id(weight) for name, weight in fresh.items() if name in stored}
    missing = next((name for name, weight in fresh.items() if id(weight) not in held), "")
    if missing:
        return f"{missing} is not in it"
    unknown = next((name for name in stored if name not in fresh), "")
    return f"{unknown} in it is no weight of its model" if unknown else ""


def _opens(folder: Path, kind: Any) -> bool:
    try:
        opened: Any = kind.from_pretrained(folder, device_map="meta", output_loading_info=True)
    except Exception:  # transformers raises a different type for every fault
        return False
    return not any(opened[1][which] for which in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def _unlike(what: str) -> CheckpointError:
    return CheckpointError(
        f"The written files do not open as the model, so they were not kept: {what}. If the model has a class of your "
        "own, or was changed after it was opened, save it with save_pretrained and open that folder to see why."
    )
