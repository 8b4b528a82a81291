"""Opens a folder that has only a PEFT adapter: its base model, with the adapter merged into the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ArchitectureError, DependencyError, UniEraseError
from ..storage.inputs import checked_path, parse_json, read_text
from .tying import resize_vocabulary, settle_config

CONFIG = "adapter_config.json"
#: The first words of the page beside an exported edit.
PAGE = "# An unlearning edit as a PEFT"
#: Files with a whole model's weights.
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: What PEFT puts before the name of a base model's weight.
PREFIX = "base_model.model."
#: Largest change of a logit that merging may cause, in standard deviations of the logits. Rounding stays far below.
ROUNDING = {torch.float32: 0.02}
ROUNDING_HALF = 0.3


def adapter_base(name: str, exported: bool = False) -> str:
    """The base model of an adapter, given as a folder or a hub id; "" if it is not an adapter.

    exported   accept an adapter that this package exported too: it can be measured, but not edited without its record

    Raises ArchitectureError for a folder with whole weights and an adapter beside them. transformers would put the
    adapter on another base, and nobody can tell which model is meant.
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
    if is_exported_edit(folder) and not exported:
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
    """Whether a folder has an adapter that this package exported. The page beside it tells."""
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
    except Exception:  # of the hub, the network or the cache; opening the model reports it
        return None
    return None if found is None else Path(found)


def first_base(name: str) -> str:
    """The whole model at the bottom of a chain of adapters; `name` itself if it is not an adapter."""
    base = adapter_base(name, exported=True)
    return first_base(base) if base else name


def refuse_without_peft(name: str) -> None:
    """Raises DependencyError if PEFT, which opens adapters, is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"{name!r} is a PEFT adapter, and peft is not installed: pip install 'unierase-plugin[peft]' ({error})."
        ) from error


def merged(name: str, base: Any) -> Any:
    """Merges the adapter `name` into the weights of `base`, in place. The config then says whether the head is tied.

    The vocabulary gets the rows that it had when the adapter was trained.

    Raises DependencyError without PEFT. Raises ArchitectureError for an adapter that does not change weights, does not
    fit the base, lacks rows of a vocabulary that grew, or gives another model once it is merged.
    """
    refuse_without_peft(name)
    from peft import PeftConfig, PeftModel
    from peft.utils.save_and_load import load_peft_weights

    config = PeftConfig.from_pretrained(name)
    held: dict[str, torch.Tensor] = load_peft_weights(name, device="cpu")
    had = _rows(base)
    trained = _trained_tokens(getattr(config, "trainable_token_indices", None))
    rows = _rows_held(name, base, held, trained)
    _resize(base, rows)
    attached = PeftModel.from_pretrained(base, name).eval()
    merge: Callable[..., Any] | None = getattr(attached.base_model, "merge_and_unload", None)
    if merge is None:
        raise ArchitectureError(
            f"The adapter {name!r} does not change weights ({_kind(attached)}), so it cannot be merged. Give the base "
            "model to edit that one, without the adapter."
        )
    _check_fit(name, attached, held)
    asked = sorted({*range(1, 9), *range(had, min(rows, had + 8)), *trained[:8]})
    before = _logits(attached, asked)
    # A row that the adapter lacks is NaN. It is reported below.
    whole = merge(safe_merge=rows <= had)
    _check_rows(name, whole, had)
    far = float((_logits(whole, asked) - before).abs().max() / before.std())
    if not far < ROUNDING.get(whole.dtype, ROUNDING_HALF):
        raise ArchitectureError(
            f"Merging the adapter {name!r} changes what the model says (a logit by {far:.2g} standard deviations). A "
            "common cause: it changes the embedding, and the model's head is tied to the embedding. Train it again "
            "without that, or give its base model."
        )
    settle_config(whole)
    return whole.eval()


def check_tokenizer(name: str, model: Any, tokenizer: Any) -> None:
    """Raises ArchitectureError if the tokenizer beside an adapter has tokens for which the merged model has no row.

    PEFT saves the rows of a vocabulary that grew, unless it is told not to or cannot see the base model.
    """
    largest, rows = max(tokenizer.get_vocab().values(), default=0), _rows(model)
    if largest >= rows:
        raise ArchitectureError(
            f"The tokenizer beside the adapter {name!r} has tokens up to number {largest}, but its base model has "
            f"{rows} rows, and the adapter holds no others. Save the adapter where it was trained with "
            "save_pretrained(DIR, save_embedding_layers=True). If those tokens were never trained, take the "
            "tokenizer's files out of the folder: the base model's are then used."
        )


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _ends(model: Any) -> list[Any]:
    """The embedding, and the head if there is one."""
    return [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]


def _trained_tokens(indices: Any) -> list[int]:
    """The tokens whose rows alone were trained, from PEFT's trainable_token_indices: a list, or lists by module."""
    return [index for each in (indices.values() if isinstance(indices, Mapping) else [indices or ()]) for index in each]


def _rows_held(name: str, base: Any, held: Mapping[str, torch.Tensor], trained: Sequence[int]) -> int:
    """The number of vocabulary rows when the adapter was trained, which may differ from the base's.

    trained   tokens whose rows alone were trained
    """
    names = {id(module): path for path, module in base.named_modules()}
    width = int(base.get_input_embeddings().weight.shape[1])
    found = {
        key: tensor.shape[0]
        for end in _ends(base)
        for key, tensor in held.items()
        if key.startswith(f"{PREFIX}{names[id(end)]}.")
        and key.endswith("weight")
        and ".lora_" not in key
        and tensor.ndim == 2
        and tensor.shape[1] == width
    }
    if len(set(found.values())) > 1:
        told = ", ".join(f"{count} in {key}" for key, count in sorted(found.items()))
        raise ArchitectureError(
            f"The adapter {name!r} holds vocabularies of different sizes: {told}. Save it anew where it was trained."
        )
    if found:
        return next(iter(found.values()))
    return max(_rows(base), *(index + 1 for index in trained), 0)


@torch.no_grad()
def _resize(base: Any, rows: int) -> None:
    """Gives the vocabulary this many rows. New rows are NaN, so that one that is never filled is noticed."""
    had = _rows(base)
    if rows == had:
        return
    resize_vocabulary(base, rows)
    for end in _ends(base):
        for weight in end.parameters(recurse=False):
            weight[had:] = math.nan


def _check_rows(name: str, whole: Any, had: int) -> None:
    for end in _ends(whole):
        for weight in end.parameters(recurse=False):
            if weight[had:].isnan().any():
                raise ArchitectureError(
                    f"The adapter {name!r} was trained with a vocabulary that grew from {had} rows to {len(weight)}, "
                    "and does not hold all of the new rows of the embedding and the head. Merge it where it was "
                    "trained (merge_and_unload()), save that model with its tokenizer, and give its folder."
                )


def _check_fit(name: str, attached: Any, held: Mapping[str, torch.Tensor]) -> None:
    """PEFT skips what does not fit, with only a warning."""
    from peft import get_peft_model_state_dict

    wanted: Mapping[str, Any] = get_peft_model_state_dict(attached, save_embedding_layers=False)
    missing = sorted(wanted.keys() - held.keys())
    # A vocabulary that grew in training is saved whole beside the adapter.
    base = {f"{PREFIX}{key}" for key in attached.get_base_model().state_dict()}
    saved = {*base, *get_peft_model_state_dict(attached, save_embedding_layers=True)}
    unknown = sorted(held.keys() - wanted.keys() - saved)
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which the base model has no place for"
        raise ArchitectureError(
            f"The adapter {name!r} does not fit its base model: it {what}. Set base_model_name_or_path in its {CONFIG} "
            "to the model that it was trained on."
        )


def _kind(attached: Any) -> str:
    return str(getattr(attached.active_peft_config.peft_type, "value", attached.active_peft_config.peft_type))


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    return model(torch.tensor([ids], device=device), use_cache=False).logits.float()  # type: ignore[no-any-return]
