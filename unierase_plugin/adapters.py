"""Opens a folder that holds a PEFT adapter alone: its base model, with the adapter merged into the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import ArchitectureError, DependencyError, UniEraseError
from .inputs import checked_path, parse_json, read_text

CONFIG = "adapter_config.json"
#: How the page begins that an exported edit has beside it.
PAGE = "# An unlearning edit as a PEFT"
#: Files that hold a whole model's weights.
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: Largest difference that merging may make to a logit, in standard deviations of the logits: rounding stays far below.
ROUNDING = {torch.float32: 0.02}
ROUNDING_HALF = 0.3


def adapter_base(name: str) -> str:
    """The base model of an adapter, a folder or the id of one on the hub; "" where it is none.

    Raises ArchitectureError for a folder that holds whole weights and an adapter beside them, of which transformers
    would take the adapter, on another base, and nobody can tell which is meant.
    """
    found = _config_file(name)
    if found is None:
        return ""
    folder = checked_path(name)
    whole = next((file for file in WHOLE if (folder / file).is_file()), "")
    if whole:
        raise ArchitectureError(
            f"{name!r} holds whole weights ({whole}) and an adapter beside them ({CONFIG}). Give a folder with one of "
            "them: without the files that begin with adapter_, the weights are edited; in a folder of its own, the "
            "adapter is merged into its base model."
        )
    if is_exported_edit(folder):
        raise ArchitectureError(
            f"{name!r} is an edit that `unierase export` wrote as an adapter, without its record. Give the edited "
            "folder that it was exported from, or its base model."
        )
    described = parse_json(read_text(found, UniEraseError), str(found), UniEraseError)
    base = described.get("base_model_name_or_path") if isinstance(described, dict) else None
    if not base:
        raise UniEraseError(f"The adapter {name!r} names no base model. Set base_model_name_or_path in its {CONFIG}.")
    return str(base)


def is_exported_edit(folder: Path) -> bool:
    """Whether a folder holds an adapter that this package exported: the page beside it tells."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8").startswith(PAGE)
    except (OSError, ValueError):
        return False


def _config_file(name: str) -> Path | None:
    folder = checked_path(name)
    if folder.is_dir():
        return folder / CONFIG if (folder / CONFIG).is_file() else None
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name)
    except Exception:  # of the hub, the network or the cache; opening the model says what it is
        return None
    return None if found is None else Path(found)


def merged(name: str, base: Any) -> Any:
    """`base` with the adapter `name` merged into its weights, which are changed in place.

    Raises DependencyError without PEFT, and ArchitectureError for an adapter that is no change of weights, that does
    not fit the base, or that does not give the same model when it is merged.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DependencyError(
            f"{name!r} is a PEFT adapter, and peft is not installed: pip install 'unierase-plugin[peft]' ({error})."
        ) from error
    attached = PeftModel.from_pretrained(base, name).eval()
    merge: Callable[..., Any] | None = getattr(attached.base_model, "merge_and_unload", None)
    if merge is None:
        raise ArchitectureError(
            f"The adapter {name!r} adds no change to weights ({_kind(attached)}), so that it cannot be merged, and an "
            "edit of its base would not be what it was trained on. Give the base model."
        )
    _check_fit(name, attached)
    before = _logits(attached)
    whole = merge(safe_merge=True)
    far = float((_logits(whole) - before).abs().max() / before.std())
    if not far < ROUNDING.get(whole.dtype, ROUNDING_HALF):
        raise ArchitectureError(
            f"Merging the adapter {name!r} changes what the model says (a logit by {far:.2g} standard deviations), as "
            "where it changes the embedding of a model whose head is tied to it. Train it anew without that, or give "
            "its base model."
        )
    return whole.eval()


def _check_fit(name: str, attached: Any) -> None:
    """PEFT leaves out what does not fit, with a warning alone."""
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    wanted: Mapping[str, Any] = get_peft_model_state_dict(attached, save_embedding_layers=False)
    held = load_peft_weights(name, device="cpu")
    missing = sorted(wanted.keys() - held.keys())
    # A vocabulary that grew in training is saved whole beside the adapter.
    base = {f"base_model.model.{key}" for key in attached.get_base_model().state_dict()}
    unknown = sorted(held.keys() - wanted.keys() - base)
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which the base model has no place for"
        raise ArchitectureError(
            f"The adapter {name!r} does not fit its base model: it {what}. Set base_model_name_or_path in its {CONFIG} "
            "to the model that it was trained on."
        )


def _kind(attached: Any) -> str:
    return str(getattr(attached.active_peft_config.peft_type, "value", attached.active_peft_config.peft_type))


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    return model(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], device=device), use_cache=False).logits.float()  # type: ignore[no-any-return]
