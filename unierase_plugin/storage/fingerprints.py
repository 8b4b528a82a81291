"""Digests that serve as cache keys: of values, of a model's weights, and of a tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, did_you_mean
from .digests import content_digests

#: Part of every cache key. Raise it when a phase computes something else.
CACHE_VERSION = "3"


def digest(*parts: str | bytes | float | Mapping[Any, Any] | Sequence[Any]) -> str:
    """Hex sha256 of the parts as canonical JSON. The order matters in sequences, not in mappings.

    Raises TypeError for a value whose text could differ between runs.
    """
    text = json.dumps(plain(parts, strict=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def model_fingerprint(model: nn.Module, names: Iterable[str] | None = None) -> str:
    """Hex sha256 over the model's type and its parameters, all or those named: name, dtype, shape and sha256 of each.

    It is the same on every device, and for every order of the modules. A tied parameter counts once, under the first of
    its names in the alphabet. Raises CheckpointError for an unknown name and for offloaded weights.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = sorted(parameters) if names is None else sorted(set(names))
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    total = hashlib.sha256(str(kind).encode())
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, ...]] = set()
    for name in chosen:
        if name not in parameters:
            raise CheckpointError(f"{type(model).__name__} has no parameter {name!r}.{did_you_mean(name, parameters)}")
        tensor = parameters[name].detach()
        if tensor.is_meta:
            raise CheckpointError(
                f"The weight {name!r} is not in memory (offloaded to disk or CPU). Load the model without offloading, "
                "on a device that holds all of it."
            )
        # Two parameters at one place in memory are one, as in a file.
        place = (tensor.data_ptr(), *tensor.shape)
        if tensor.data_ptr() and place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor
    for (name, tensor), part in zip(tensors.items(), content_digests(tensors.values()), strict=True):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + part)
    return total.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of a tokenizer: vocabulary, merges, normalisation, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        # The latest call leaves both behind. They are no part of the tokenizer.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return digest(rules, special, {"chat_template": getattr(tokenizer, "chat_template", None)})


def plain(value: Any, *, strict: bool = False) -> Any:
    """The value as JSON: dataclasses and mappings as objects, tensors as lists, NaN and infinity as null.

    Any other value becomes its text, or a TypeError if `strict`.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spec.name: plain(getattr(value, spec.name), strict=strict) for spec in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, strict=strict) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, strict=strict) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, strict=strict) for item in value), key=repr)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), strict=strict)
    if strict and not isinstance(value, (Path, torch.dtype, torch.device)):
        raise TypeError(
            f"{type(value).__name__} {value!r} has no stable text. Give str, bytes, numbers, lists or mappings."
        )
    return str(value)
