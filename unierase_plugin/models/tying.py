"""Whether a model's head is its embedding. Its weights tell; its config may say something else, and is then wrong.

transformers goes by the config where it resizes a vocabulary and where it opens what it saved: it ties a head that is
not tied, which is then lost, and draws one at random where the only copy was the embedding's.
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
    """Whether both are one in memory, be it as two parameters."""
    if head is embedding:
        return True
    return not head.is_meta and head.shape == embedding.shape and head.data_ptr() == embedding.data_ptr() != 0


def says_tied(config: Any) -> bool:
    """Whether a config says that the head is the embedding."""
    return all(getattr(each, SETTING, False) for each in _parts(config))


def has_head_unlike_config(model: Any) -> bool:
    """Whether the head is a matrix of its own and the config says that it is the embedding."""
    head = model.get_output_embeddings()
    return says_tied(model.config) and head is not None and not head.weight.is_meta and not is_tied(model)


def settle_config(model: Any) -> None:
    """Makes the config say what the weights say."""
    tied = is_tied(model)
    for config in _parts(model.config):
        setattr(config, SETTING, tied)


@contextmanager
def settled_config(model: Any) -> Iterator[None]:
    """The config says inside what the weights said at the start, and after it what it did before."""
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
    """Gives embedding and head this many rows, tied as they were. New rows are to be filled by the caller."""
    with settled_config(model):
        model.resize_token_embeddings(rows, mean_resizing=False)


def _parts(config: Any) -> list[Any]:
    """A model's config, and that of its language model where they are two."""
    return list({id(each): each for each in (config, config.get_text_config(decoder=True))}.values())
