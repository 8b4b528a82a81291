"""Whether a model's head is its embedding. The weights decide; the config may be wrong.

transformers follows the config when it resizes a vocabulary and when it opens a saved model. It then ties a head that
is not tied, which loses the head. Or it draws a head at random, if the only copy was the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

#: The setting of a config that says it.
SETTING = "tie_word_embeddings"


def is_tied(model: Any) -> bool:
    """Whether one matrix is the model's embedding and its head."""
    head = model.get_output_embeddings()
    return head is not None and same_matrix(head.weight, model.get_input_embeddings().weight)


def same_matrix(head: Tensor, embedding: Tensor) -> bool:
    """Whether both are one in memory, even as two parameters."""
    if head is embedding:
        return True
    return not head.is_meta and head.shape == embedding.shape and head.data_ptr() == embedding.data_ptr() != 0


def says_tied(config: Any) -> bool:
    """Whether a config says that the head is the embedding."""
    return all(getattr(each, SETTING, False) for each in _parts(config))


def has_head_unlike_config(model: Any) -> bool:
    """Whether the head is a matrix of its own while the config says that it is the embedding."""
    head = model.get_output_embeddings()
    return says_tied(model.config) and head is not None and not head.weight.is_meta and not is_tied(model)


def settle_config(model: Any) -> None:
    """Corrects the config to match the weights."""
    tied = is_tied(model)
    for config in _parts(model.config):
        setattr(config, SETTING, tied)


@contextmanager
def settled_config(model: Any) -> Iterator[None]:
    """Inside, the config matches the weights as they were at the start. Afterwards it is as before."""
    before = [(config, getattr(config, SETTING, None)) for config in _parts(model.config)]
    settle_config(model)
    try:
        yield
    finally:
        for config, said in before:
            if said is None:
                delattr(config, SETTING)
            else:
                setattr(config, SETTING, said)


def resize_vocabulary(model: Any, rows: int) -> None:
    """Gives embedding and head this many rows, tied as before. The caller must fill the new rows."""
    with settled_config(model):
        model.resize_token_embeddings(rows, mean_resizing=False)


def _parts(config: Any) -> list[Any]:
    """A model's config, and that of its language model if they differ."""
    return list({id(each): each for each in (config, config.get_text_config(decoder=True))}.values())
