"""Quantised checkpoints: opened in plain weights where transformers can de-quantise them, else refused.

A closed-form edit changes plain weights. So the edited model is written in plain weights too, in the checkpoint's
dtype, and a revert gives the de-quantised model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ArchitectureError

logger = logging.getLogger(__name__)


def dequantising(name: str, config: Any) -> Mapping[str, Any]:
    """Options of `from_pretrained` with which transformers de-quantises the weights; none for plain weights.

    Raises ArchitectureError for a kind of quantisation that transformers cannot undo. Reads no weights.
    """
    stated = _stated(config)
    if stated is None:
        return {}
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        plan = AutoQuantizationConfig.from_dict(dict(stated))
    except (ValueError, TypeError, ImportError):  # a kind that this release does not know, or lacks a package for
        plan = None
    if not hasattr(plan, "dequantize"):
        raise ArchitectureError(
            f"{name!r} has quantised weights ({method_of(stated)}), which a closed-form edit cannot change, and "
            "transformers cannot undo this kind. Load the original bf16, fp16 or fp32 weights, edit them, and quantise "
            "the result."
        )
    plan.dequantize = True
    return {"quantization_config": plan}


def tell_dequantised(name: str, config: Any) -> None:
    """Logs that quantised weights were opened as plain ones, and what is written then; nothing for plain weights."""
    stated = _stated(config)
    if stated is not None:
        dtype = str(dtype_of(config)).removeprefix("torch.")
        logger.warning(
            "The weights of %s are quantised (%s). They are de-quantised, and the output holds plain %s weights. A "
            "revert gives the de-quantised model. Quantise the output anew to serve it as before.",
            name,
            method_of(stated),
            dtype,
        )


def dtype_of(config: Any) -> torch.dtype:
    """The dtype in which de-quantised weights are written: the one that the config names, else bfloat16."""
    named = getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.bfloat16


@torch.no_grad()
def settle_dequantised(model: Any, dtype: Any) -> None:
    """Makes a de-quantised model like any other: all weights in one dtype, and saved as they are.

    transformers leaves de-quantised weights and the others in different dtypes, and would quantise them when it saves.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    # transformers' own loader of GGUF does the same.
    model._weight_conversions = None


def method_of(stated: Any) -> str:
    """The name of a kind of quantisation, from what a config says of it."""
    method = stated.get("quant_method") if isinstance(stated, Mapping) else getattr(stated, "quant_method", None)
    return str(getattr(method, "value", method) or "unnamed")


def _stated(config: Any) -> Mapping[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, Mapping) else vars(found)
