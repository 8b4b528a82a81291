"""What a model writes, token by token, whatever its own settings for writing are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Any, ids: Tensor, mask: Tensor, room: int, pad_id: int, *, temperature: float = 0.0, **settings: Any
) -> Tensor:  # fmt: skip
    """Ids (B, n) that follow prompts (B, T) padded on the left, n at most `room`, ends and padding after them included.

    Greedy at temperature 0, else drawn from the whole distribution. Of the model's own settings only the ends hold:
    beams, penalties and forbidden repetitions would change what is measured. `settings` go to the model's `generate`.
    """
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with ends_alone(model, pad_id):
        found: Tensor = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, **drawn, **settings)
    return found[:, ids.shape[1] :]


@contextmanager
def ends_alone(model: Any, pad_id: int) -> Iterator[None]:
    """The model's settings are bare inside: a config that is passed along is filled up from the model's own."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=pad_id)
    try:
        yield
    finally:
        model.generation_config = own
