"""Adds one token to a tokenizer and its model, and takes it out again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import TokenError, shown
from .tying import resize_vocabulary
from .weights import OriginalWeights


def add_token(model: Any, tokenizer: Any, name: str) -> int:
    """Makes room for a token in tokenizer and model, and returns its id. Uses a padding row of the embedding, if any.

    Raises TokenError if the name is taken or does not tokenise as exactly one token.
    """
    index = add_to_tokenizer(tokenizer, name)
    if index >= model.get_input_embeddings().weight.shape[0]:
        resize_vocabulary(model, index + 1)
    return index


class TokenRoom:
    """The token's entry in model and tokenizer, and the way back."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        """Makes room like `add_token`."""
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._words = copy.deepcopy(tokenizer).__dict__
        self.id = add_token(model, tokenizer, name)
        taken = self._parameters() if self.id < self.vocabulary else []
        self._row = OriginalWeights(taken, row=self.id)

    def leave(self) -> None:
        """Restores model and tokenizer, to the bit."""
        if self.id >= self.vocabulary:
            resize_vocabulary(self.model, self.vocabulary)
        self._row.restore()
        # A tokenizer cannot drop a token, so its whole state is put back.
        self.tokenizer.__dict__.clear()
        self.tokenizer.__dict__.update(self._words)

    def _parameters(self) -> list[Tensor]:
        """The parameters that hold a row, or an entry, for each token."""
        head = self.model.get_output_embeddings()
        found = [self.model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
        return [weight for weight in found if weight is not None]


def add_to_tokenizer(tokenizer: Any, name: str) -> int:
    """Adds the token to the tokenizer only, and returns its id. Raises TokenError like `add_token`."""
    vocabulary = tokenizer.get_vocab()
    if name in vocabulary:
        free = next(n for n in (f"<unlearn_{k}>" for k in range(1, len(vocabulary) + 2)) if n not in vocabulary)
        raise TokenError(
            f"The vocabulary already holds {shown(name)} (id {vocabulary[name]}). Choose another unlearning_token, "
            f"such as {free!r}: it is a setting in the file that --hparams names. If an earlier edit added that token, "
            "start from the folder that has its record."
        )
    from tokenizers import AddedToken

    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, normalized=False, special=True)]}, **_keep_others(tokenizer)
    )
    index = tokenizer.convert_tokens_to_ids(name)
    # A new token gets the number of tokens as its id. If the ids have gaps, this id can be in use.
    taken = next((word for word, number in vocabulary.items() if number == index), None)
    if taken is not None:
        raise TokenError(
            f"The tokenizer gives {shown(name)} the id {index}, but {taken!r} has this id: it holds {len(vocabulary)} "
            f"tokens with ids up to {max(vocabulary.values())}, so some ids are free. Give every free id a name in "
            f'the vocabulary of tokenizer.json, such as "<free_{_free(vocabulary)}>": {_free(vocabulary)}, and load '
            "it again."
        )
    check_token(tokenizer, name, index)
    return int(index)


def _free(vocabulary: Mapping[str, int]) -> int:
    """The first id that no token has, if the ids have gaps."""
    taken = set(vocabulary.values())
    return next(number for number in range(len(vocabulary)) if number not in taken)


def _keep_others(tokenizer: Any) -> dict[str, bool]:
    """The argument that keeps a tokenizer's other special tokens. Its name changed with transformers 5."""
    import inspect

    names = inspect.signature(tokenizer.add_special_tokens).parameters
    return {n: False for n in ("replace_extra_special_tokens", "replace_additional_special_tokens") if n in names}


def check_token(tokenizer: Any, name: str, index: int) -> None:
    """Raises TokenError unless the name is exactly one token in any place, without a space before it."""
    alone = tokenizer(name, add_special_tokens=False)["input_ids"]
    apart = tokenizer("a", add_special_tokens=False)["input_ids"] + [index]
    if alone != [index] or tokenizer("a" + name, add_special_tokens=False)["input_ids"] != apart:
        raise TokenError(
            f"{shown(name)} does not tokenise as exactly one token (got {alone}, wanted [{index}]). Choose a name that "
            "the tokenizer does not split and does not put a space before, such as '<unlearn_0>'."
        )
