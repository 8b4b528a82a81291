"""Generates text token by token, independently of the model's own generation settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Any, ids: Tensor, mask: Tensor, room: int, pad_id: int, *, temperature: float = 0.0, **settings: Any
) -> Tensor:
    """Ids (B, n), n at most `room`, that follow left-padded prompts (B, T), with end tokens and padding after them.

    Greedy at temperature 0, else sampled from the whole distribution. Of the model's own settings only the end tokens
    count: beams, penalties and forbidden repetitions would change the measurement. `settings` go to the model's
    `generate`.
    """
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with ends_alone(model, pad_id):
        found: Tensor = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, **drawn, **settings)
    return found[:, ids.shape[1] :]


@contextmanager
def ends_alone(model: Any, pad_id: int) -> Iterator[None]:
    """Inside, the model's own settings are its end tokens alone: transformers fills up a given config from them."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=pad_id)
    try:
        yield
    finally:
        model.generation_config = own
